"""The pieces of a long document have the tokens of the whole document."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fiddlehead.data import BPETokenizer, ByteTokenizer, TokenizerFile, pieces
from fiddlehead.data.token_writer import encode_documents
from fiddlehead.data.tokenize import tokenize
from fiddlehead.data.tokenizers import JSONTokenizer
from fiddlehead.errors import ConfigError
from tests.data.small_tokenizers import KINDS, TEXTS


def _trained(model: Tokenizer) -> JSONTokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["</s>"])
    model.train_from_iterator([*TEXTS, "a b c  d   e\n\nf g"], trainer)
    return JSONTokenizer(model.to_str())


@cache
def tokenizer(kind: str, folder: Path) -> JSONTokenizer | TokenizerFile:
    if kind in KINDS:
        KINDS[kind](folder / kind)
        return TokenizerFile(folder / kind)
    if kind == "byte-level":
        return BPETokenizer(280).train(TEXTS)
    model = Tokenizer(models.BPE(byte_fallback=True))
    scheme, split = {"first": ("first", True), "always": ("always", True), "unsplit": ("never", False)}[kind]
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    model.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    return _trained(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


WORDS = st.sampled_from(
    [
        "fern",
        " ",
        "  ",
        "\n",
        "\n ",
        "\t",
        "A",
        "don't",
        "7",
        "\u00fc",
        "e\u0301",
        "\u0301",
        "\u6f22",
        "<think>",
        "</s>",
        "def f_1(x)",
        ". ",
    ]
)
DOCUMENTS = st.lists(WORDS, max_size=150).map("".join) | st.text(max_size=120)


@pytest.mark.parametrize("kind", [*KINDS, "byte-level", "first", "always", "unsplit"])
@given(text=DOCUMENTS)
@settings(max_examples=60, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(folder: Path, kind: str, text: str) -> None:
    made = tokenizer(kind, folder)
    with patch.object(pieces, "PIECE", 5):
        found = list(pieces.pieces(text, made._cuts, made.encode))
    assert [i for piece in found for i in made.encode(piece)] == made.encode(text)


@pytest.mark.parametrize("kind", ["qwen", "llama3", "byte-level", "llama2", "gemma", "first", "always"])
def test_ordinary_text_is_cut(folder: Path, kind: str) -> None:
    """Else the comparison above would say nothing."""
    made = tokenizer(kind, folder)
    with patch.object(pieces, "PIECE", 50):
        found = list(pieces.pieces(" ".join(TEXTS), made._cuts, made.encode))
    assert len(found) > 10 and max(map(len, found)) < 120


def test_a_document_of_many_bytes_is_that_of_bytes() -> None:
    text = "fr\u00fcn" * 400_000
    expected = np.frombuffer(text.encode(), dtype=np.uint8)
    ids = encode_documents(ByteTokenizer(), ["a", text, "b"])
    assert ids[:2].tolist() == [97, 256] and ids[-3:].tolist() == [256, 98, 256]
    assert (ids[2:-3] == expected).all()


def test_a_tokenizer_learns_the_same_from_pieces() -> None:
    text = "\n".join(TEXTS) * 3
    whole = BPETokenizer(280).train([text])
    with patch.object(pieces, "PIECE", 50):
        assert BPETokenizer(280).train([text]).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("text", "vocabulary", "pre_tokenizers"),
    [
        ("x" * 100, ["a"], ["ByteLevel"]),
        ("a b " * 30, ["a\u0120b"], ["ByteLevel"]),
        ("a b " * 30, ["a"], ["FixedLength"]),
    ],
    ids=["no place", "tokens of several words", "a pre-tokenizer that counts"],
)
def test_what_cannot_be_cut_is_refused_above_a_size(
    text: str, vocabulary: list[str], pre_tokenizers: list[str]
) -> None:
    cuts = pieces.kinds(vocabulary, pre_tokenizers)
    with patch.object(pieces, "PIECE", 20):
        assert list(pieces.pieces(text, cuts, list)) == [text]  # pyright: ignore
        with patch.object(pieces, "LONGEST", 60), pytest.raises(ConfigError, match="no place from 20 to 60 where"):
            list(pieces.pieces(text, cuts, list))  # pyright: ignore


def test_a_refused_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 3_000_000)
    made = BPETokenizer(280).train(TEXTS)
    with (
        patch.object(pieces, "LONGEST", 1_500_000),
        pytest.raises(ConfigError, match=r"a\.txt: a document of 3,000,000"),
    ):
        tokenize([tmp_path / "a.txt"], made, tmp_path / "out", workers=1, progress=False)
