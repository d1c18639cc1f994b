"""Special tokens as a folder names them, against transformers' AutoTokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.special_tokens import SpecialTokens
from fiddlehead.data.token_file import TokenDatasetInfo
from fiddlehead.data.tokenize import tokenize
from fiddlehead.data.tokenizers import JSONTokenizer, TokenizerFile, save_tokenizer
from fiddlehead.errors import ConfigError
from tests.data.small_tokenizers import KINDS, change, save_gemma, save_llama3, save_qwen

MESSAGES = [
    {"role": "user", "content": " What is a fern? "},
    {"role": "assistant", "content": "A plant."},
    {"role": "user", "content": "And x?"},
]


def as_published(folder: Path) -> None:
    """Nothing is changed."""


def without_names(folder: Path) -> None:
    change(folder / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None, unk_token=None)


def in_a_file_of_their_own(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = {name: settings[name] for name in ("bos_token", "eos_token") if name in settings}
    objects = {name: {"content": token, "lstrip": False, "rstrip": False} for name, token in named.items()}
    without_names(folder)
    change(folder / "special_tokens_map.json", **objects)


def with_another_in_a_file_that_counts_more(folder: Path) -> None:
    token = TokenizerFile(folder).token(1)
    change(folder / "special_tokens_map.json", eos_token=token, sep_token=token)


def with_another_in_a_file_that_does_not_count(folder: Path) -> None:
    with_another_in_a_file_that_counts_more(folder)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder / "tokenizer_config.json", added_tokens_decoder={token.pop("id"): token for token in added})


def as_objects_with_a_type(folder: Path) -> None:
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    change(folder / "tokenizer_config.json", eos_token={"__type": "AddedToken", "content": eos, **flags})


def with_a_name_of_their_own(folder: Path) -> None:
    token = TokenizerFile(folder).eos_token
    change(folder / "tokenizer_config.json", turn_token=token, extra_special_tokens={"boi_token": token})


def with_the_template_in_a_file(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings["chat_template"] + "{{ eos_token }}", encoding="utf-8")


def with_several_templates(folder: Path) -> None:
    text = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": text + "{{ eos_token }}"}]
    change(folder / "tokenizer_config.json", chat_template=templates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changed",
    [
        as_published,
        in_a_file_of_their_own,
        with_another_in_a_file_that_counts_more,
        with_another_in_a_file_that_does_not_count,
        as_objects_with_a_type,
        with_a_name_of_their_own,
        with_the_template_in_a_file,
        with_several_templates,
    ],
)
def test_special_tokens_are_those_of_transformers(kind: str, changed: Callable[[Path], None], tmp_path: Path) -> None:
    import transformers

    folder = KINDS[kind](tmp_path)
    changed(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, template = TokenizerFile(folder), ChatTemplate.load(folder)
    assert (ours.eos_token, ours.eos_id) == (theirs.eos_token, theirs.eos_token_id)
    assert ours.id_of("bos_token") == theirs.bos_token_id
    assert ours.special.names.items() <= theirs.special_tokens_map.items()
    assert template is not None
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert template.render(MESSAGES, add_generation_prompt=True) == text
    # Not those of transformers, which makes a LlamaTokenizer anew and passes over the file's normalizer.
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert ours.encode_with_special(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_token_that_only_the_settings_call_special_is_one(tmp_path: Path) -> None:
    """It is in the vocabulary, and is not among the added tokens."""
    import transformers

    folder = save_qwen(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), TokenizerFile(folder)
    text = "<|im_start|>def<|im_end|>\n"
    assert ours.eos_id == theirs.eos_token_id
    assert ours.encode_with_special(text) == theirs(text).input_ids
    assert ours.decode(theirs(text).input_ids) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    lengths = ours.token_bytes()
    assert lengths is not None and lengths[ours.eos_id] == 0
    assert ours.eos_id not in ours.encode(text)


@pytest.mark.parametrize("where", ["added", "vocabulary"])
def test_an_ordinary_token_does_not_end_documents(where: str, tmp_path: Path) -> None:
    """Gemma's </s> is an HTML tag."""
    spec = json.loads((save_gemma(tmp_path) / "tokenizer.json").read_text())
    if where == "vocabulary":
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "</s>"]
    assert JSONTokenizer(json.dumps(spec)).eos_token == "<eos>"
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<eos>"]
    with pytest.raises(ConfigError, match=r"candidates: '<pad>'.*; not special: '</s>', '<eos>'"):
        JSONTokenizer(json.dumps(spec))


@pytest.mark.parametrize("folder_of_ids", [".", "huggingface"])
def test_what_a_folder_names_goes_before_what_is_usual(folder_of_ids: str, tmp_path: Path) -> None:
    folder = save_llama3(tmp_path)
    without_names(folder)
    (folder / "generation_config.json").unlink()
    ids = folder / folder_of_ids
    ids.mkdir(exist_ok=True)
    named = {
        token: TokenizerFile(folder, eos=token).eos_id for token in ("<|eom_id|>", "<|eot_id|>", "<|end_of_text|>")
    }
    eom, eot, end = named.values()
    assert TokenizerFile(folder).eos_id == end  # the most usual
    change(ids / "generation_config.json", eos_token_id=[eot, end])
    assert TokenizerFile(folder).eos_id == eot
    change(ids / "config.json", eos_token_id=2)  # as transformers writes where nobody says it: an ordinary token
    assert TokenizerFile(folder).eos_id == eot
    change(ids / "config.json", eos_token_id=None, text_config={"eos_token_id": [2, eom]})
    assert TokenizerFile(folder).eos_id == eom
    change(folder / "special_tokens_map.json", eos_token="<|end_of_text|>")
    assert TokenizerFile(folder).eos_id == end
    assert TokenizerFile(folder, eos="<|eom_id|>").eos_id == eom


def test_a_model_stops_at_all_that_end_a_text(tmp_path: Path) -> None:
    folder = save_llama3(tmp_path)
    ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    end, eom, eot = ids
    assert TokenizerFile(folder).stop_ids == [eot, end, eom]
    change(folder / "generation_config.json", eos_token_id=[end, 9999])  # which no token has
    assert TokenizerFile(folder).stop_ids == [eot, end]
    (folder / "generation_config.json").unlink()
    assert TokenizerFile(folder).stop_ids == [eot]
    change(folder / "config.json", eos_token_id=[end, eom])
    assert TokenizerFile(folder).stop_ids == [eot, end, eom]
    assert JSONTokenizer((folder / "tokenizer.json").read_text()).stop_ids == [end]


@pytest.mark.parametrize("eos", [None, "<eos>", "<end_of_turn>", "</s>"])
@pytest.mark.parametrize("changed", [as_published, without_names, in_a_file_of_their_own])
def test_a_saved_tokenizer_has_the_same_special_tokens(
    eos: str | None, changed: Callable[[Path], None], tmp_path: Path
) -> None:
    before = save_gemma(tmp_path / "before")
    changed(before)
    (before / "huggingface").mkdir()
    (before / "generation_config.json").rename(before / "huggingface" / "generation_config.json")
    (tmp_path / "after").mkdir()
    tokenizer = TokenizerFile(before, eos=eos)
    for _ in range(2):  # a run that goes on saves it again
        save_tokenizer(tokenizer, tmp_path / "after")
    after = TokenizerFile(tmp_path / "after")
    assert (after.eos_id, sorted(after.stop_ids)) == (tokenizer.eos_id, sorted(tokenizer.stop_ids))
    assert after.fingerprint == tokenizer.fingerprint
    assert after.special.names.items() - {("eos_token", after.eos_token)} <= tokenizer.special.names.items()
    templates = [ChatTemplate.load(folder) for folder in (before, tmp_path / "after")]
    assert None not in templates and templates[0].text == templates[1].text  # type: ignore[union-attr]


def test_a_dataset_ends_documents_as_the_folder_says_and_keeps_what_it_says(tmp_path: Path) -> None:
    folder = save_gemma(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("def f(x): </s> <eos>")
    info = tokenize([tmp_path / "a.txt"], TokenizerFile(folder), tmp_path / "out", workers=1, progress=False)
    tokens = np.fromfile(tmp_path / "out" / f"{'train' if info.train.tokens else 'val'}.bin", dtype=np.uint16)
    assert tokens[-1] == info.eos_id == 1 and tokens[0] == 2
    assert np.count_nonzero(tokens == 1) == 1  # what is in the text is text
    opened = TokenDatasetInfo.read(tmp_path / "out").open_tokenizer(tmp_path / "out")
    assert opened.stop_ids == TokenizerFile(folder).stop_ids == [1, 5]
    assert ChatTemplate.load(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: cannot be read"),
        ("special_tokens_map.json", "[]", r"special_tokens_map\.json: must hold a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token=5: must be the text of a token"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<edn>"}',
            r"tokenizer_config\.json: eos_token='<edn>' is not a token",
        ),
        ("generation_config.json", '{"eos_token_id": "1"}', r"generation_config\.json: eos_token_id='1': must be"),
        ("config.json", '{"eos_token_id": [1, "2"]}', r"config\.json: eos_token_id=\[1, '2'\]: must be"),
    ],
)
def test_files_that_name_no_token_are_refused(file: str, text: str, said: str, tmp_path: Path) -> None:
    folder = save_gemma(tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(ConfigError, match=said):
        TokenizerFile(folder)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"name": "rag", "template": "r"}], "chat_template has rag; one of them must be named default"),
        ({"rag": "r", "tool": "t"}, "chat_template has rag, tool; one of them must be named default"),
        (5, "chat_template is a number; must be text, or named texts"),
        ([{"name": "default", "template": 5}], "chat_template is a number; must be"),
    ],
)
def test_an_invalid_template_is_refused(given: Any, said: str, tmp_path: Path) -> None:
    change(save_gemma(tmp_path) / "tokenizer_config.json", chat_template=given)
    with pytest.raises(ConfigError, match=said):
        ChatTemplate.load(tmp_path)


def test_a_folder_without_files_names_nothing(tmp_path: Path) -> None:
    found: Any = SpecialTokens.read(tmp_path)
    assert (found.names, found.special, found.config_eos_ids, found.generation_eos_ids) == ({}, frozenset(), (), ())
