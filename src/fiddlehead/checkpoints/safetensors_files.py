"""Reads and writes safetensors files larger than memory, one tensor or chunk at a time.

The format is eight bytes that hold the header's length, a JSON header, and the tensors' bytes one after another. The
`safetensors` package reads it too, but writes only what is in memory as a whole.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import parse_json, read_start, reason
from fiddlehead.numbers import is_whole

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""In the order in which the `safetensors` package writes them."""
FORMAT = {"format": "pt"}
"""The metadata of a file with a model: how transformers knows whose tensors they are."""
_CHUNK = 1 << 23


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    dtype: str
    """As the format writes it: a key of `DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """The offset of its bytes in the file."""
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, a few MB at a time; each chunk is valid until the next one."""
        buffer = memoryview(bytearray(min(_CHUNK, self.nbytes)))
        left = self.nbytes
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                read = file.readinto(buffer[:left])
                if not read:
                    raise ConfigError(Problem.in_file(self.file, "is cut short"))
                left -= read
                yield buffer[:read]

    def load(self, slices: Sequence[slice] = ()) -> torch.Tensor:
        """Returns the tensor, in memory of its own; with slices, one a dimension, only that part is read."""
        if slices:
            first, row = slices[0], self.nbytes // max(1, self.shape[0])
            count = first.stop - first.start
            rows = replace(
                self, shape=(count, *self.shape[1:]), start=self.start + first.start * row, nbytes=count * row
            )
            return rows.load()[(slice(None), *slices[1:])]
        data = bytearray(self.nbytes)
        at = 0
        for chunk in self.chunks():
            data[at : at + len(chunk)] = chunk
            at += len(chunk)
        if not data:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(self.shape)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is to be written, with its bytes made only then."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]
    """Makes its bytes."""

    @property
    def nbytes(self) -> int:
        """The bytes that it will take."""
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype].itemsize


def lazy_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """Tensors in the order in which the `safetensors` package writes them; each is brought to main memory in turn."""
    names = {dtype: name for name, dtype in DTYPES.items()}

    def chunks(tensor: torch.Tensor) -> Callable[[], Iterable[memoryview]]:
        return lambda: [bytes_of(tensor.detach().cpu())]

    return {
        name: LazyTensor(names[(t := tensors[name]).dtype], tuple(t.shape), chunks(t)) for name in in_order(tensors)
    }


def in_order(tensors: Mapping[str, Any]) -> list[str]:
    """The names of tensors, or of what has a dtype, in the order in which the `safetensors` package writes them."""
    order = {dtype: number for number, dtype in enumerate(DTYPES.values())}
    return sorted(tensors, key=lambda name: (order[tensors[name].dtype], name))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in main memory, not copied if it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors in a safetensors file by name.

    Raises:
        ConfigError: it is not such a file, or not whole.
    """
    try:
        size = file.stat().st_size
        begin = read_start(file, 8)
        if begin == b"version ":
            raise ValueError("it is a pointer of Git LFS; `git lfs pull` fetches the file")
        length = int.from_bytes(begin, "little")
        if length > size - 8:
            raise ValueError("its header is cut short")
        header = parse_json(read_start(file, 8 + length)[8:], strict=True)
        if not isinstance(header, dict):
            raise ValueError(f"its header is not an object but a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__: must be an object whose values are texts")
        tensors = {name: _stored_tensor(file, name, entry, 8 + length) for name, entry in header.items()}
        _refuse_gaps(tensors, 8 + length)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem.in_file(file, f"is not a safetensors file: {reason(error)}")) from error
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise ConfigError(Problem.in_file(file, f"has {size} bytes, and its header says {end}"))
    return tensors


def _stored_tensor(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or not all(field in entry for field in fields):
        raise ValueError(f"{name}: must be an object with {', '.join(fields)}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r} is not read; allowed: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(is_whole(size) and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"{name}: shape {shape!r}: must be a list of whole numbers from 0 to below 2**63")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_whole(at) and at >= 0 for at in offsets):
        raise ValueError(f"{name}: data_offsets {offsets!r}: must be two whole numbers of 0 or more")
    stored = StoredTensor(file, dtype, tuple(shape), data + offsets[0], offsets[1] - offsets[0])
    if LazyTensor(stored.dtype, stored.shape, lambda: ()).nbytes != stored.nbytes:
        raise ValueError(f"{name}: a tensor of shape {shape} and dtype {dtype} does not have {stored.nbytes} bytes")
    return stored


def _refuse_gaps(tensors: Mapping[str, StoredTensor], start: int) -> None:
    """Raises ValueError unless each tensor begins where another, or the header, ends, as the format has it."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != start:
            raise ValueError(f"{name}: begins at byte {tensor.start}, and what is before it ends at {start}")
        start += tensor.nbytes


class FileChecksum(TypedDict):
    """The size and the checksum of a file that was written."""

    bytes: int
    crc32: int


def write_file(
    file: Path,
    tensors: Mapping[str, LazyTensor],
    advance: Callable[[int], Any] = lambda count: None,
    metadata: Mapping[str, str] | None = FORMAT,
) -> FileChecksum:
    """Writes a safetensors file, and returns its size and checksum.

    Args:
        advance: is told how many more bytes are written, now and then.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are read faster from aligned addresses
    with file.open("wb", buffering=0) as stream:
        checksum = _write(stream, len(text).to_bytes(8, "little") + text, 0)
        for name, tensor in tensors.items():
            written = 0
            for chunk in tensor.chunks():
                checksum = _write(stream, chunk, checksum)
                written += len(chunk)
                advance(len(chunk))
            assert written == tensor.nbytes, f"{name}: {written} bytes, not {tensor.nbytes}"
        return FileChecksum(bytes=stream.tell(), crc32=checksum)


def _write(stream: BinaryIO, data: bytes | memoryview, checksum: int) -> int:
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]
    return zlib.crc32(data, checksum)
