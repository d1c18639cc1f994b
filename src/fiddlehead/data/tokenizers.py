"""Text to token ids and back. All tokenizers save to one format, the `tokenizer.json` that Hugging Face tools read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fiddlehead.data.json_tokenizer import JSONTokenizer
from fiddlehead.data.pieces import PIECE, kinds, pieces
from fiddlehead.data.special_tokens import COMPANIONS, NAMES_FILES, SpecialTokens, update_settings
from fiddlehead.data.tokenizer_spec import END_OF_TEXT, byte_characters, byte_level_spec, fingerprint
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import read_text
from fiddlehead.files.paths import user_path
from fiddlehead.numbers import is_whole

_MAX_BYTES = 1 << 26
"""The largest size of a file; files with 262,144 tokens have half of it."""


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        ...

    @property
    def begin_ids(self) -> list[int]:
        """The tokens before every document and every prompt, such as Llama's <|begin_of_text|>; often none."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short hash of what the tokenizer does: equal fingerprints mean equal tokens for every text."""
        ...

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without special tokens; the name of a special token in the text is plain text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def pieces(self, text: str) -> Iterator[str]:
        """Pieces of a long text that have the tokens of the whole; raises `ConfigError` where it cannot be cut."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each token stands for, (vocab_size,) int32, 0 for special tokens; None where unknown."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes the file `path` in the format of `tokenizer.json`."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, each its own id, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256

    @property
    def begin_ids(self) -> list[int]:
        return []

    @property
    def fingerprint(self) -> str:
        return fingerprint(byte_level_spec(), self.eos_id)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def pieces(self, text: str) -> Iterator[str]:
        return (text[start : start + PIECE] for start in range(0, len(text), PIECE))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < self.eos_id).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, dtype=np.int32)
        lengths[self.eos_id] = 0
        return lengths

    def save(self, path: str | Path) -> None:
        user_path(path).write_text(json.dumps(byte_level_spec(), ensure_ascii=False), encoding="utf-8")


class BPETokenizer:
    """A byte-level BPE tokenizer that is still to be trained, on the corpus of its data.

    Of its `vocab_size` tokens, 256 are the bytes and one ends a document; the rest are learned.
    """

    def __init__(self, vocab_size: int = 1024) -> None:
        if not (is_whole(vocab_size) and vocab_size >= 257):
            raise ConfigError(Problem("vocab_size", vocab_size, "must be 257 (256 bytes and one special) or more"))
        self.vocab_size = vocab_size

    @property
    def fingerprint(self) -> str:
        """A short hash of how it would be trained."""
        return hashlib.sha256(f"byte-level bpe {self.vocab_size}".encode()).hexdigest()[:16]

    def train(self, texts: Iterable[str]) -> JSONTokenizer:
        """The tokenizer learned from `texts`.

        Raises `ConfigError` when the texts have too few different pairs for `vocab_size` tokens.
        """
        import tokenizers

        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        splitter = model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=byte_characters(),
        )

        def words(text: str) -> list[str]:
            return [word for word, _ in splitter.pre_tokenize_str(text)]  # not by way of the model, which is locked

        cuts = kinds((), ["ByteLevel"])
        model.train_from_iterator((piece for text in texts for piece in pieces(text, cuts, words)), trainer)
        if model.get_vocab_size() < self.vocab_size:
            message = f"needs more text to learn from; these documents give at most {model.get_vocab_size()} tokens"
            raise ConfigError(Problem("vocab_size", self.vocab_size, message))
        return JSONTokenizer(model.to_str(), eos=END_OF_TEXT)


class TokenizerFile(JSONTokenizer):
    """The tokenizer in a `tokenizer.json`, or in a folder that holds one.

    `path` is the file or the folder. `eos` is the token that ends a document. None takes the one that the neighbouring
    files name, or else the first of the usual names that is a special token (see `JSONTokenizer`). Raises `ConfigError`
    for a file that is missing or broken, and if no end-of-document token is found.
    """

    def __init__(self, path: str | Path, eos: str | int | None = None) -> None:
        self.path = user_path(path)
        file = self.path / "tokenizer.json" if self.path.is_dir() else self.path
        try:
            text = read_text(file, _MAX_BYTES)
        except FileNotFoundError:
            raise ConfigError(Problem("path", path, f"is not a tokenizer: there is no file {file}")) from None
        except (OSError, ValueError) as error:
            raise ConfigError(Problem("path", path, f"cannot be read: {error}")) from error
        super().__init__(text, eos=eos, special=SpecialTokens.read(file.parent), source=str(file))

    @property
    def companions(self) -> list[Path]:
        """The files beside it that name its special tokens and say how a chat is written."""
        folder = self.path if self.path.is_dir() else self.path.parent
        files = (folder / name for name in COMPANIONS)
        return [file for file in files if file.is_file()]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` to `folder`, with the files that accompany `tokenizer`.

    `TokenizerFile(folder)` then has the same special tokens, the same end of a document and the same `stop_ids`.
    """
    tokenizer.save(folder / "tokenizer.json")
    for file in getattr(tokenizer, "companions", ()):
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
    if not isinstance(tokenizer, JSONTokenizer):
        return
    try:
        found = tokenizer.beside(folder).eos_id
    except ConfigError:  # only `eos` says which one it is
        found = None
    if found != tokenizer.eos_id:
        for file in (folder / name for name in NAMES_FILES):
            if file.name == NAMES_FILES[0] or file.is_file():
                update_settings(file, eos_token=tokenizer.eos_token)
    if tokenizer.beside(folder).stop_ids != tokenizer.stop_ids:
        update_settings(folder / "generation_config.json", eos_token_id=tokenizer.stop_ids)


def refuse_missing_rows(tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises `ConfigError`, naming each, if tokens have no row in the embedding of a model of `vocab_size` tokens."""
    if beyond := sorted({int(i) for i in ids if i >= vocab_size}):
        raise ConfigError(*(Problem.in_file(where, f"has {no_row(tokenizer, i, vocab_size)}") for i in beyond))


def no_row(tokenizer: Tokenizer, number: int, vocab_size: int) -> str:
    """A phrase that names a token without a row in the embedding of a model of `vocab_size` tokens."""
    try:
        text = f" {tokenizer.token(number)!r}" if isinstance(tokenizer, JSONTokenizer) else ""
    except KeyError:  # a dataset that was not made with its tokenizer
        text = ""
    return f"the token{text} ({number}), and the model has vocab_size={vocab_size}: ids from 0 to {vocab_size - 1}"
