"""A model with its tokenizer: what it writes, where it stops, and how likely it finds a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead.data import ByteTokenizer, TokenizerFile
from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.generation import Sampling
from fiddlehead.text import Writer, likelihood, until
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


def test_a_text_ends_with_a_document_or_for_want_of_room(writer: Writer) -> None:
    expected = writer.complete([[97]], 9, sampling=Sampling(temperature=0))[0].ids
    ended = Writer(writer.model, Fixed(writer.tokenizer.path, expected[4]), None, "test")
    (found,) = ended.complete([[97]], 9, sampling=Sampling(temperature=0))
    assert (found.ids, found.finish_reason) == (expected[:4], "stop")
    assert writer.complete([[97] * 30], 9)[0].finish_reason == "length"
    with pytest.raises(ConfigError, match="prompts of 32 tokens"):
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


def test_a_text_of_nothing_and_a_stride_of_none_are_refused(writer: Writer) -> None:
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        likelihood(writer, "a")
    with pytest.raises(ConfigError, match="stride=33: must be from 1 to seq_length=32"):
        likelihood(writer, "abc", 33)
