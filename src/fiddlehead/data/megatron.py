"""Megatron's indexed datasets: `PREFIX.bin` with token ids, and `PREFIX.idx` with their sequences and documents.

The layout of `PREFIX.idx`, little-endian: `MMIDIDX`, two zero bytes; the version, 1, uint64; the code of the ids' type,
uint8; the number S of sequences and the number D of document borders, uint64 each; the sequences' lengths in ids, S
int32; the byte at which each begins in `PREFIX.bin`, S int64; for each document the number of its first sequence, and
in the end S, D int64. A dataset of several kinds of input has S int8 more.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from fiddlehead.data.token_file import windows_of
from fiddlehead.errors import ConfigError, Problem

DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
"""The types of ids by their codes."""
VERSION = 1

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX"
_HEADER = struct.Struct("<9sQBQQ")
_AT_ONCE = 1 << 22
"""Entries that are checked at once."""


def prefix_of(path: Path) -> Path | None:
    """The prefix of the dataset that a path names, with `.bin` or `.idx` or without; None if there is no such file."""
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    if not path.name:  # "." and "/", which are folders
        return None
    return path if any(_file(path, suffix).is_file() for suffix in (".bin", ".idx")) else None


def prefixes_in(folder: Path) -> list[Path]:
    """The prefixes of the datasets in a folder."""
    return sorted(file.with_suffix("") for file in folder.glob("*.idx"))


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


@dataclass(frozen=True)
class MegatronIndex:
    """The checked content of a `.idx`, memory-mapped."""

    prefix: Path
    dtype: str
    lengths: np.ndarray
    """Ids of each sequence, (S,) int32."""
    pointers: np.ndarray
    """The byte in the `.bin` at which each sequence begins, (S,) int64; they follow each other."""
    borders: np.ndarray
    """The first sequence of each document, and in the end S, (documents + 1,) int64."""

    @classmethod
    def read(cls, prefix: Path) -> MegatronIndex:
        """Reads and checks the index, and compares it with the size of the `.bin`.

        Raises:
            ConfigError: a file is missing, cut short, damaged, or of a kind that is not read.
        """
        stamps = []
        for suffix in (".idx", ".bin"):
            try:
                found = _file(prefix, suffix).stat()
            except OSError as error:
                message = f"cannot be read: {error.strerror}; a dataset of Megatron is a .bin and a .idx"
                raise ConfigError(Problem.in_file(_file(prefix, suffix), message)) from error
            stamps.append((found.st_size, found.st_mtime_ns, found.st_ino))
        return _read(prefix, *stamps)

    @property
    def bin(self) -> Path:
        """The file with the ids."""
        return _file(self.prefix, ".bin")

    @property
    def files(self) -> tuple[Path, Path]:
        """Both files of the dataset."""
        return self.bin, _file(self.prefix, ".idx")

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.borders) - 1

    @property
    def total(self) -> int:
        """The number of all ids."""
        return self.start(len(self.lengths))

    def start(self, sequence: int) -> int:
        """The number of ids before a sequence, or, for the number S of sequences, of all."""
        size = np.dtype(self.dtype).itemsize
        if sequence < len(self.pointers):
            return int(self.pointers[sequence]) // size
        return int(self.pointers[-1]) // size + int(self.lengths[-1]) if len(self.pointers) else 0

    def check(self, bin_size: int) -> None:
        """Raises `ConfigError` if the index contradicts itself, or a `.bin` of this size."""
        size, at = np.dtype(self.dtype).itemsize, 0
        for first in range(0, len(self.lengths), _AT_ONCE):
            lengths = self.lengths[first : first + _AT_ONCE].astype(np.int64)
            if (wrong := np.flatnonzero(lengths < 0)).size:
                self._damaged(f"sequence {first + wrong[0]:,} has {lengths[wrong[0]]} ids")
            ends = at + size * np.cumsum(lengths)
            starts = self.pointers[first : first + _AT_ONCE]
            expected = np.concatenate([[at], ends[:-1]])
            if (wrong := np.flatnonzero(starts != expected)).size:
                n = int(wrong[0])
                self._damaged(
                    f"sequence {first + n:,} begins at byte {starts[n]:,}, not where another ends: {expected[n]:,}"
                )
            at = int(ends[-1])
        last = 0
        for first in range(0, len(self.borders), _AT_ONCE):
            borders = self.borders[first : first + _AT_ONCE]
            if (np.diff(borders, prepend=last) < 0).any():
                self._damaged("its documents are not in ascending order")
            last = int(borders[-1])
        if self.borders[0] != 0 or last != len(self.lengths):
            self._damaged(f"its documents are the sequences {self.borders[0]:,} to {last:,} of {len(self.lengths):,}")
        if bin_size != at:
            raise ConfigError(Problem.in_file(self.bin, f"has {bin_size:,} bytes, and its .idx says {at:,}"))

    def _damaged(self, message: str) -> NoReturn:
        raise ConfigError(Problem.in_file(_file(self.prefix, ".idx"), f"is damaged: {message}"))


Stamp = tuple[int, int, int]
"""The size, the time and the inode of a file."""


@lru_cache(maxsize=64)
def _read(prefix: Path, index: Stamp, tokens: Stamp) -> MegatronIndex:
    """Reads and checks an index, once for files that have not changed."""
    file = _file(prefix, ".idx")
    try:
        with file.open("rb") as stream:
            header = stream.read(_HEADER.size)
        dtype, sequences, documents = _read_header(file, header, index[0])
        raw = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {error.strerror}")) from error
    at = _HEADER.size
    arrays = []
    for kind, count in (("<i4", sequences), ("<i8", sequences), ("<i8", documents)):
        end = at + count * np.dtype(kind).itemsize
        arrays.append(raw[at:end].view(kind))
        at = end
    found = MegatronIndex(prefix, dtype, *arrays)
    found.check(tokens[0])
    return found


def _read_header(file: Path, header: bytes, size: int) -> tuple[str, int, int]:
    """The type of the ids, and the numbers of sequences and of document borders."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(Problem.in_file(file, message))

    if header.startswith(_OLD_MAGIC):
        refuse("is of Megatron's oldest format (TNTIDX), which is not read; write it again with --dataset-impl mmap")
    if not header.startswith(_MAGIC):
        refuse(f"is not an index of Megatron: it does not begin with {_MAGIC[:7].decode()}")
    if len(header) < _HEADER.size:
        refuse(f"is cut short: it has {size} bytes, and its header alone has {_HEADER.size}")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != VERSION:
        refuse(f"has format version {version}; this fiddlehead reads version {VERSION}")
    dtype = DTYPES.get(code)
    if dtype is None:
        known = ", ".join(f"{number} ({name})" for number, name in DTYPES.items())
        refuse(f"has the type code {code}; known: {known}")
    if dtype.startswith("float"):
        refuse(f"has {dtype} values, which are not token ids")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if documents and size == expected + sequences and sequences:
        refuse("has a mode for each sequence: multimodal datasets are not read")
    if size != expected or not documents:
        said = f"{sequences:,} sequences and {documents:,} document borders"
        refuse(f"is damaged or cut short: it has {size:,} bytes, and {said} need {expected:,}")
    return dtype, sequences, documents


class MegatronTokens:
    """The ids of some documents of a dataset, memory-mapped read-only: documents `first` to `last`, without `last`.

    `eos_id` ends a document too, where it occurs within one.
    """

    def __init__(self, prefix: Path, first: int, last: int, eos_id: int | None = None) -> None:
        self.index = index = MegatronIndex.read(prefix)
        self.first, self.last, self.eos_id = first, last, eos_id
        begin, end = (index.start(int(index.borders[number])) for number in (first, last))
        dtype = np.dtype(index.dtype).newbyteorder("<")
        # An empty file cannot be mapped; slices of np.memmap itself are several times slower to make.
        mapped = np.memmap(index.bin, dtype=dtype, mode="r") if index.total else np.empty(0, dtype)
        self._tokens, self._begin = np.asarray(mapped)[begin:end], begin

    def __len__(self) -> int:
        return len(self._tokens)

    def windows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """The tokens [start, start + length) for each of `starts`, (len(starts), length) int64."""
        return windows_of(self._tokens, starts, length)

    def ends(self, starts: Sequence[int], windows: np.ndarray) -> np.ndarray:
        """Whether a document ends with each of the tokens of `windows`, which begin at `starts`; bool, as `windows`."""
        ends = np.zeros(windows.shape, dtype=bool) if self.eos_id is None else windows == self.eos_id
        documents = range(self.first, self.last + 1)
        for row, start in zip(ends, starts, strict=True):
            here = self._begin + start
            low = bisect_right(documents, here, key=self._document_start)
            high = bisect_right(documents, here + len(row), lo=low, key=self._document_start)
            for document in documents[low:high]:
                row[self._document_start(document) - here - 1] = True
        return ends

    def _document_start(self, document: int) -> int:
        return self.index.start(int(self.index.borders[document]))

    def first_outside(self, vocab_size: int) -> tuple[int, int] | None:
        """Position and id of the first token that is not from 0 to below `vocab_size`; None if all are."""
        for start in range(0, len(self), _AT_ONCE):
            ids = self._tokens[start : start + _AT_ONCE]
            outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(outside):
                return self._begin + start + int(outside[0]), int(ids[outside[0]])
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return MegatronTokens, (self.index.prefix, self.first, self.last, self.eos_id)  # a worker maps the file itself


class IndexWriter:
    """Collects the lengths of documents of one sequence each, and writes their index.

    Args:
        dtype: of the ids.
    """

    def __init__(self, dtype: str) -> None:
        self._code = next(code for code, name in DTYPES.items() if name == dtype)
        self._size = np.dtype(dtype).itemsize
        self._lengths: list[np.ndarray] = []

    def add(self, lengths: Sequence[int]) -> None:
        """Adds documents by their numbers of ids."""
        self._lengths.append(np.asarray(lengths, dtype="<i4"))

    def write(self, stream: BinaryIO) -> None:
        """Writes the `.idx`."""
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        ends = self._size * np.cumsum(lengths, dtype="<i8")
        stream.write(_HEADER.pack(_MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1))
        stream.write(lengths.tobytes())
        stream.write(np.concatenate([np.zeros(1, "<i8"), ends])[: len(lengths)].tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
