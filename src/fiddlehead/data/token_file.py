"""Token datasets: folders of memory-mapped token ids that are complete or do not exist.

A dataset is `train.bin` and `val.bin` (little-endian uint16, or uint32 for a vocabulary of more than 65536; every
document ends in the end-of-document token), `tokenizer.json`, and `meta.json`, which says what the others must be.
Written for Megatron too, it also has `train.idx` and `val.idx`, and int32 instead of uint32, which Megatron cannot
read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fiddlehead.data.checksums import content
from fiddlehead.data.tokenizers import TokenizerFile
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import filled, read_json
from fiddlehead.files.paths import user_path

FORMAT = "fiddlehead token dataset"
FORMAT_VERSION = 1
DTYPES = ("uint16", "uint32", "int32")

_AT_ONCE = 2**24
"""Tokens that are searched at once."""

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class SplitInfo:
    """The contents of one split; `bytes` is the UTF-8 length of its text, `sha256` the hash of its token file.

    `max_id` is the largest token id in it; None where the dataset was written without.
    """

    tokens: int
    documents: int
    bytes: int
    sha256: str
    max_id: int | None = None


@dataclass(frozen=True)
class TokenDatasetInfo:
    """The contents of a token dataset's `meta.json`."""

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer: str
    """The tokenizer's fingerprint."""
    sources: tuple[str, ...]
    train: SplitInfo
    val: SplitInfo

    @classmethod
    def read(cls, directory: str | Path) -> TokenDatasetInfo:
        """The description of the dataset in `directory`; raises `ConfigError` if it is not a dataset."""
        directory = user_path(directory)
        if not directory.is_dir():
            raise ConfigError(
                Problem.in_file(directory, "is not a token dataset: there is no such folder; `tokenize` makes one")
            )
        try:
            meta = read_json(directory / "meta.json")
        except FileNotFoundError:
            raise ConfigError(
                Problem.in_file(directory, "is not a token dataset: it has no meta.json; `tokenize` makes one")
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(Problem.in_file(directory / "meta.json", f"cannot be read: {error}")) from error
        if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
            raise ConfigError(
                Problem.in_file(directory, "is not a token dataset: its meta.json was written by another program")
            )
        version = meta.pop("version", None)
        if version != FORMAT_VERSION:
            message = (
                f"has format version {version}; this fiddlehead reads version {FORMAT_VERSION}: tokenize "
                "again, or use the fiddlehead that wrote it"
            )
            raise ConfigError(Problem.in_file(directory, message))
        try:
            info = filled(cls, meta)
            if info.dtype not in DTYPES:
                raise ValueError(Problem("dtype", info.dtype, "", DTYPES))
            return info
        except ValueError as error:
            raise ConfigError(Problem.in_file(directory / "meta.json", f"is damaged: {error}")) from error

    def text(self) -> str:
        """The text of `meta.json`."""
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    def open_tokenizer(self, directory: str | Path) -> TokenizerFile:
        """The tokenizer that made the dataset in `directory`."""
        return TokenizerFile(user_path(directory) / "tokenizer.json", eos=self.eos_id)


class TokenFile:
    """The tokens of one split of a dataset, memory-mapped read-only.

    Raises `ConfigError` for a folder that is not a dataset, a truncated file, and a tokenizer or vocabulary other than
    the expected one.
    """

    def __init__(
        self,
        directory: str | Path,
        split: Split = "train",
        *,
        expect_fingerprint: str | None = None,
        expect_vocab_size: int | None = None,
    ) -> None:
        self.directory = user_path(directory)
        self.split: Split = split
        self.info = info = TokenDatasetInfo.read(self.directory)
        if expect_fingerprint is not None and expect_fingerprint != info.tokenizer:
            message = (
                f"was made with tokenizer {info.tokenizer} ({info.vocab_size} tokens), not with {expect_fingerprint}"
            )
            raise ConfigError(Problem.in_file(directory, message))
        if expect_vocab_size is not None and expect_vocab_size != info.vocab_size:
            raise ConfigError(
                Problem.in_file(directory, f"has a vocabulary of {info.vocab_size} tokens, not of {expect_vocab_size}")
            )
        self._tokens = _map(self.directory / f"{split}.bin", info.dtype, getattr(info, split).tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def first_beyond(self, vocab_size: int) -> tuple[int, int] | None:
        """Position and id of the first token with an id of `vocab_size` or above; None if there is none.

        It reads the file only if `meta.json` does not rule out such a token.
        """
        largest = getattr(self.info, self.split).max_id
        if self.info.vocab_size <= vocab_size or (largest is not None and largest < vocab_size):
            return None
        for start in range(0, len(self), _AT_ONCE):
            beyond = np.flatnonzero(self._tokens[start : start + _AT_ONCE] >= vocab_size)
            if len(beyond):
                position = start + int(beyond[0])
                return position, int(self._tokens[position])
        return None

    def check(self) -> str:
        """Compares the file with `meta.json`, and returns its SHA-256.

        The whole file is read, but only once: the cache folder keeps the result, by the file's size, time and inode.

        Raises:
            ConfigError: the file has changed since it was written, or has token ids beyond the vocabulary.
        """
        path, info = self.directory / f"{self.split}.bin", self.info
        found, written = content(path, info.dtype), getattr(info, self.split).sha256
        if found.sha256 != written:
            message = (
                f"is not what was written: its SHA-256 is {found.sha256[:16]}..., and {written[:16]}... in "
                "its meta.json; tokenize again"
            )
            raise ConfigError(Problem.in_file(path, message))
        if found.max_id >= info.vocab_size:
            message = (
                f"has the token id {found.max_id}, and its meta.json says vocab_size={info.vocab_size}; tokenize again"
            )
            raise ConfigError(Problem.in_file(path, message))
        return found.sha256

    def window(self, start: int, length: int) -> np.ndarray:
        """The tokens [start, start + length), (length,) int64."""
        return self.windows([start], length)[0]

    def windows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """The tokens [start, start + length) for each of `starts`, (len(starts), length) int64."""
        return windows_of(self._tokens, starts, length)

    def ends(self, starts: Sequence[int], windows: np.ndarray) -> np.ndarray:
        """Whether a document ends with each of the tokens of `windows`, which begin at `starts`; bool, as `windows`."""
        return windows == self.info.eos_id

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.directory, self.split)  # a worker maps the file itself: pickling a map would copy it


def windows_of(tokens: np.ndarray, starts: Sequence[int], length: int) -> np.ndarray:
    """The tokens [start, start + length) for each of `starts`, (len(starts), length) int64.

    Raises:
        IndexError: one of them is not within the tokens.
    """
    if min(starts) < 0 or max(starts) + length > len(tokens):
        raise IndexError(f"windows of {length} from {min(starts)} to {max(starts)} are not within {len(tokens)} tokens")
    windows = np.empty((len(starts), length), dtype=np.int64)
    for row, start in zip(windows, starts, strict=True):
        row[:] = tokens[start : start + length]
    return windows


def _map(path: Path, dtype: str, tokens: int) -> np.ndarray:
    expected = tokens * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ConfigError(Problem.in_file(path, f"is missing, though its meta.json tells of {tokens} tokens")) from None
    if size != expected:
        raise ConfigError(
            Problem.in_file(path, f"has {size} bytes, but {tokens} {dtype} tokens are {expected}: tokenize again")
        )
    if not tokens:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    # A plain array on the map: slices of np.memmap itself are several times slower to make.
    return np.asarray(np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r"))
