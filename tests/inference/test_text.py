"""A model with its tokenizer: generated text, where it stops, and the likelihood of a text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead.data import ByteTokenizer, TokenizerFile
from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.errors import ConfigError
from fiddlehead.inference.generation import Sampling, sample
from fiddlehead.inference.text import Writer, likelihood, until
from fiddlehead.models import Transformer, TransformerConfig
from tests.data.small_tokenizers import change, save_gemma
from tests.data.test_chat_template import CHATML
from tests.data.test_examples import with_begin


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """A model of bytes that knows nothing."""
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, vocab_size=257, seq_length=32,
        init_method_std=0.5,
    )  # fmt: skip
    return Writer(Transformer(config).eval(), TokenizerFile(tmp_path), None, "test")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [([], "abcabd."), (["d"], "abcab"), (["abd"], "abc"), (["x", "ca"], "ab"), (["a"], ""), (["d.!"], "abcabd.")],
)
def test_text_ends_before_a_stop_and_nothing_of_it_is_shown(stop: list[str], expected: str) -> None:
    texts = ["a", "ab", "abcab", "abcabd", "abcabd."]
    pieces = list(until(stop, texts))
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_what_is_written_is_text_and_repeats_with_its_seed(writer: Writer) -> None:
    first = "".join(writer.write("fern ", 12, seed=3))
    assert first == "".join(writer.write("fern ", 12, seed=3)) != "".join(writer.write("fern ", 12, seed=4))


@pytest.mark.parametrize("stop", [[], ["e"], ["\u00e9\u00e9", "z"]])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_texts_written_together_are_those_written_alone(writer: Writer, stop: list[str], batch_size: int) -> None:
    prompts = ["fern ", "", "mosses and", "fern ", "ivy  ", "a longer text of 30 bytes here"]
    done = []
    sampling = Sampling(seed=3, top_k=40)
    options: dict[str, Any] = {"sampling": sampling, "batch_size": batch_size, "advance": done.append}
    written = writer.write_all(prompts, 12, stop=stop, **options)
    assert sum(done) == len(prompts)
    for prompt, each in zip(prompts[:-1], written, strict=False):
        assert each.text == "".join(writer.write(prompt, 12, stop=stop, seed=3, top_k=40))
        assert each.finish_reason == (
            "length" if len(each.ids) == 12 and not any(s in each.text for s in stop) else "stop"
        )
    assert len(written[-1].ids) <= 2  # where the model's length ends, and not before for the others


def test_a_text_ends_with_its_document_or_at_the_length_limit(writer: Writer) -> None:
    expected = writer.complete([[97]], 9, sampling=Sampling(temperature=0))[0].ids
    ended = Writer(writer.model, Fixed(writer.tokenizer.path, expected[4]), None, "test")
    (found,) = ended.complete([[97]], 9, sampling=Sampling(temperature=0))
    assert (found.ids, found.finish_reason) == (expected[:4], "stop")
    assert writer.complete([[97] * 30], 9)[0].finish_reason == "length"
    with pytest.raises(ConfigError, match="prompts: have 32 tokens"):
        writer.complete([[97] * 32], 9)


class Fixed(TokenizerFile):
    """A tokenizer with another end of a document."""

    def __init__(self, path: Path, eos: int) -> None:
        super().__init__(path)
        self.eos_id = eos


def test_a_chat_needs_a_template(writer: Writer) -> None:
    with pytest.raises(ConfigError, match="test: has no chat template"):
        next(writer.answer([{"role": "user", "content": "hi"}]))
    chatty = Writer(writer.model, writer.tokenizer, ChatTemplate(CHATML, {}), "test")
    assert isinstance("".join(chatty.answer([{"role": "user", "content": "hi"}], 4)), str)


@pytest.mark.parametrize("stride", [None, 1, 7, 32])
def test_every_token_is_predicted_once(writer: Writer, stride: int | None) -> None:
    text = "ferns and mosses are not flowers, " * 3
    found = likelihood(writer, text, stride)
    assert (found.tokens, found.text_bytes) == (len(text) - 1, len(text))
    ids = torch.tensor(list(text.encode()))
    expected, stride = 0.0, stride or 16
    for token in range(1, len(ids)):  # from all that its window has before it, one by one
        start = max(0, math.ceil((token - 32) / stride)) * stride
        logits = writer.model(ids[None, start:token])[0, -1].detach()
        expected += F.cross_entropy(logits, ids[token]).item()
    assert found.nats == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def beginning(writer: Writer, tmp_path: Path) -> Writer:
    """A model whose tokenizer puts a token in front of every text."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=258, seq_length=32, init_method_std=0.5
    )
    return Writer(Transformer(config).eval(), with_begin(tmp_path / "begin", writer.tokenizer), None, "test")


def test_texts_begin_as_the_tokenizer_begins_them(beginning: Writer) -> None:
    (begin,) = beginning.tokenizer.begin_ids
    ids, expected = [begin, *b"fern"], b""
    for _ in range(12):
        token = int(beginning.model(torch.tensor([ids]))[0, -1].argmax())
        ids, expected = [*ids, token], expected + bytes([token] if token < 256 else [])
    text = expected.decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(beginning.write("fern", 12, temperature=0)) == text
    (written,) = beginning.write_all(["fern"], 12, sampling=Sampling(temperature=0))
    assert (written.text, written.ids) == (text, ids[5:])
    assert isinstance("".join(beginning.write("", 4)), str)


def test_with_a_token_in_front_the_first_is_predicted_too(beginning: Writer) -> None:
    ids = torch.tensor([*beginning.tokenizer.begin_ids, *b"ferns and mosses"])
    found = likelihood(beginning, "ferns and mosses")
    expected = F.cross_entropy(beginning.model(ids[None, :-1])[0].detach(), ids[1:], reduction="sum")
    assert (found.tokens, found.text_bytes) == (16, 16)
    assert found.nats == pytest.approx(float(expected), rel=1e-5)


def test_a_text_that_is_too_short_and_an_impossible_stride_are_refused(writer: Writer) -> None:
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        likelihood(writer, "a")
    with pytest.raises(ConfigError, match="stride=33: must be from 1 to seq_length=32"):
        likelihood(writer, "abc", 33)


@pytest.mark.parametrize("named", [[256, 0], [0]])
def test_it_stops_at_every_token_that_the_folder_names(writer: Writer, named: list[int], tmp_path: Path) -> None:
    drawn: dict[str, Any] = {"temperature": 3.0, "seed": 2}
    expected = writer.complete([[97]], 9, sampling=Sampling(**drawn))[0].ids
    stop = expected[3]
    assert stop not in expected[:3]
    change(tmp_path / "generation_config.json", eos_token_id=[*named, stop])
    ending = replace(writer, tokenizer=TokenizerFile(tmp_path), template=ChatTemplate("a", {}))
    (found,) = ending.complete([[97]], 9, sampling=Sampling(**drawn))
    assert (found.ids, found.finish_reason) == (expected[:3], "stop")
    text = bytes(expected[:3]).decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(ending.write("a", 9, **drawn)) == text
    assert "".join(ending.answer([{"role": "user", "content": "a"}], 9, **drawn)) == text


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_that_are_not_tokens_are_never_generated(writer: Writer, temperature: float, tmp_path: Path) -> None:
    """The vocabulary of the model is padded, and the tokenizer has ids that no token has."""
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"][0]["id"] = 270
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    torch.manual_seed(0)
    model = Transformer(replace(writer.model.config, vocab_size=300)).eval()
    with torch.no_grad():
        model.output_layer.weight[256:] *= 3  # else the likeliest are among the bytes
    padded = replace(writer, model=model, tokenizer=TokenizerFile(tmp_path))
    assert any(i > 255 for i in sample(model, [97], 20, temperature=temperature))
    written = padded.complete([[97]] * 2, 20, sampling=Sampling(temperature=temperature), seeds=range(2))
    assert all(i < 256 for each in written for i in each.ids)
    assert "".join(padded.write("a", 20, temperature=temperature)) == written[0].text.rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )


def test_a_token_that_the_model_has_no_row_for_is_named(writer: Writer, tmp_path: Path) -> None:
    folder = save_gemma(tmp_path / "gemma")
    tokenizer = TokenizerFile(folder)
    model = Transformer(replace(writer.model.config, vocab_size=tokenizer.vocab_size - 1)).eval()
    seeing = Writer(model, tokenizer, ChatTemplate("{{ messages[0].content }}", {}), "test")
    assert isinstance("".join(seeing.write("<image_soft_token>", 3)), str)  # in a prompt it is text
    message = rf"the token '<image_soft_token>' \({tokenizer.vocab_size - 1}\), and the model has vocab_size="
    with pytest.raises(ConfigError, match=message):
        next(seeing.answer([{"role": "user", "content": "<image_soft_token>"}]))
    with pytest.raises(ConfigError, match=message):
        seeing.complete([[5, tokenizer.vocab_size - 1]], 3)
