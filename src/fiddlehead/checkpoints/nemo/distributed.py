"""Reads a distributed checkpoint of PyTorch, which Megatron-core calls `torch_dist`: `.metadata` and `*.distcp`.

`.metadata` says of each tensor its dtype and size, and of each chunk of it where it is: a file, an offset and a length.
There is what `torch.save` wrote: a zip archive, not compressed, with a description (`data.pkl`) and the bytes.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fiddlehead.checkpoints.nemo.pickles import DTYPES as DTYPE_NAMES
from fiddlehead.checkpoints.nemo.pickles import (
    BytesStorage,
    ChunkStorage,
    Index,
    Metadata,
    Properties,
    Storage,
    StorageInfo,
    TensorStorage,
    read_metadata,
    read_tensor,
)
from fiddlehead.checkpoints.safetensors_files import DTYPES
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import inside, read_bytes, reason
from fiddlehead.numbers import is_whole

METADATA = ".metadata"
_MAX_METADATA = 1 << 30
_MAX_DESCRIPTION = 1 << 16
_MAX_DIMENSIONS = 8

Shape = tuple[int, ...]


@dataclass
class Chunk:
    """A block of a tensor, in a file."""

    file: Path
    start: int
    """The offset of its archive in the file."""
    length: int
    dtype: str
    offsets: Shape
    sizes: Shape
    _bytes_at: int | None = field(default=None, repr=False)
    _strides: Shape = field(default=(), repr=False)
    _numbers: int = field(default=0, repr=False)

    def load(self, leading: Sequence[int]) -> torch.Tensor:
        """The part of the chunk at these indices, within the chunk, of the first dimensions; in memory of its own.

        Raises:
            ConfigError: its archive is damaged.
        """
        try:
            if self._bytes_at is None:
                self._bytes_at, self._strides, self._numbers = self._describe()
            sizes, kind = self.sizes[len(leading) :], DTYPES[self.dtype]
            contiguous = self._strides == _contiguous(self.sizes)
            begin = sum(index * stride for index, stride in zip(leading, self._strides, strict=False))
            count = math.prod(sizes) if contiguous else self._numbers
            data = bytearray(count * kind.itemsize)
            with self.file.open("rb") as file:
                file.seek(self._bytes_at + (begin * kind.itemsize if contiguous else 0))
                if file.readinto(data) != len(data):
                    raise ValueError("is cut short")
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
            raise ConfigError(Problem.in_file(self.file, f"at byte {self.start:,}: {reason(error)}")) from error
        if not data:
            return torch.empty(sizes, dtype=kind)
        whole = torch.frombuffer(data, dtype=kind)
        return whole.view(sizes) if contiguous else whole.as_strided(sizes, self._strides[len(leading) :], begin)

    def _describe(self) -> tuple[int, Shape, int]:
        """Where the bytes are in the file, the strides, and how many numbers there are. Raises ValueError."""
        with self.file.open("rb") as file:
            if self.start + self.length > file.seek(0, io.SEEK_END):
                raise ValueError("is cut short")
            file.seek(self.start)
            if file.read(2) != b"PK":
                raise ValueError("is not a tensor as torch.save writes it; other formats are not read")
            with zipfile.ZipFile(_Part(file, self.start, self.length)) as archive:  # type: ignore[arg-type]
                members = {member.filename: member for member in archive.infolist()}
                name = next((name for name in members if name.endswith("/data.pkl")), "")
                if not name or members[name].file_size > _MAX_DESCRIPTION:
                    raise ValueError("its archive has no description of a tensor")
                stem = name.removesuffix("data.pkl")
                if f"{stem}byteorder" in members and archive.read(f"{stem}byteorder")[:6] != b"little":
                    raise ValueError("its numbers are big-endian")
                key, strides, numbers = self._checked(archive.read(name))
                member = members.get(f"{stem}data/{key}")
            expected = numbers * DTYPES[self.dtype].itemsize
            if member is None or member.compress_type != zipfile.ZIP_STORED or member.file_size != expected:
                raise ValueError(f"its archive does not have the {expected:,} bytes of the tensor")
            at = self.start + member.header_offset
            file.seek(at)
            header = file.read(30)  # the lengths of the name and of the extra field are its last four bytes
            at += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if at + expected > self.start + self.length:
                raise ValueError("is cut short")
            return at, strides, numbers

    def _checked(self, description: bytes) -> tuple[str, Shape, int]:
        """The name of the storage, the strides, and the size of the storage; raises ValueError for another tensor."""
        tensor = read_tensor(description)
        if len(tensor.arguments) < 4:
            raise ValueError("its description is damaged")
        storage, begin, sizes, strides = tensor.arguments[:4]
        if not (isinstance(storage, tuple) and len(storage) == 5 and storage[0] == "storage"):
            raise ValueError("its description is damaged")
        _, kind, key, _, numbers = storage
        dtype = kind.dtype if isinstance(kind, type) and issubclass(kind, Storage) else None  # type: ignore[attr-defined]
        if dtype != self.dtype or sizes != self.sizes:
            raise ValueError(f"is {dtype} {sizes}, and {METADATA} says {self.dtype} {self.sizes}")
        whole = (begin, numbers, *strides) if isinstance(strides, tuple) else (None,)
        if not all(is_whole(each) and 0 <= each < 2**62 for each in whole) or len(strides) != len(sizes):
            raise ValueError("its description is damaged")
        end = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
        if begin or (math.prod(sizes) and end != numbers) or math.prod(sizes) != numbers or not isinstance(key, str):
            raise ValueError("its tensor is not the whole storage")
        contiguous = _contiguous(sizes)
        # The stride of a dimension of size 1 means nothing.
        normal = tuple(c if size == 1 else s for s, c, size in zip(strides, contiguous, sizes, strict=True))
        return key, normal, numbers


class _Part(io.RawIOBase):
    """A part of an open file as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("is cut short")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


@dataclass(frozen=True)
class DistributedTensor:
    """A tensor of a distributed checkpoint."""

    name: str
    dtype: str
    """A key of `safetensors_files.DTYPES`."""
    shape: Shape
    chunks: tuple[Chunk, ...]

    def load(self, leading: Sequence[int] = ()) -> torch.Tensor:
        """The part at these indices of the first dimensions, in memory of its own; only its chunks are read."""
        n = len(leading)
        whole = torch.empty(self.shape[n:], dtype=DTYPES[self.dtype])
        for chunk in self.chunks:
            inner = [index - offset for index, offset in zip(leading, chunk.offsets, strict=False)]
            if all(0 <= index < size for index, size in zip(inner, chunk.sizes, strict=False)):
                place = zip(chunk.offsets[n:], chunk.sizes[n:], strict=True)
                part = chunk.load(inner)
                if len(self.chunks) == 1:
                    return part.contiguous()
                whole[tuple(slice(offset, offset + size) for offset, size in place)] = part
        return whole


def read_distributed(folder: Path) -> dict[str, DistributedTensor]:
    """The tensors of a distributed checkpoint by name; the tensors themselves are read when they are loaded.

    Raises:
        ConfigError: it is not one, or it is damaged.
    """
    file = inside(folder, METADATA)
    try:
        metadata = read_metadata(read_bytes(file, _MAX_METADATA))
        return _tensors(folder, metadata)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(Problem.in_file(file, f"cannot be read: {reason(error)}")) from error


def _tensors(folder: Path, metadata: Metadata) -> dict[str, DistributedTensor]:
    entries, places = metadata["state_dict_metadata"], metadata["storage_data"]
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ValueError("it is damaged")
    where: dict[tuple[str, Shape], StorageInfo] = {}
    for index, place in places.items():
        if not isinstance(index, Index) or not isinstance(place, StorageInfo):
            raise ValueError("it is damaged")
        if index.get("offset") is not None:
            where[index["fqn"], _shape(index["offset"])] = place
    found = {}
    files: dict[Any, Path] = {}
    for name, entry in entries.items():
        if isinstance(entry, BytesStorage):
            continue
        if not isinstance(entry, TensorStorage) or not isinstance(name, str):
            raise ValueError(f"{name}: is neither a tensor nor bytes")
        found[name] = _tensor(folder, name, entry, where, files)
    return found


def _tensor(
    folder: Path,
    name: str,
    entry: TensorStorage,
    where: Mapping[tuple[str, Shape], StorageInfo],
    files: dict[Any, Path],
) -> DistributedTensor:
    properties, shape, listed = entry["properties"], _shape(entry["size"]), entry["chunks"]
    if not isinstance(properties, Properties) or not isinstance(listed, list):
        raise ValueError(f"{name}: it is damaged")
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else properties["dtype"]
    if dtype not in DTYPE_NAMES.values():
        raise ValueError(f"{name}: has a dtype that is not read")
    chunks = []
    for chunk in listed:
        if not isinstance(chunk, ChunkStorage):
            raise ValueError(f"{name}: it is damaged")
        offsets, sizes = _shape(chunk["offsets"]), _shape(chunk["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"{name}: a chunk has other dimensions than the tensor")
        place = where.get((name, offsets))
        if place is None:
            raise ValueError(f"{name}: the chunk at {list(offsets)} is nowhere")
        if place.get("transform_descriptors"):
            raise ValueError(f"{name}: is compressed or encrypted, which is not read")
        path, start, length = place["relative_path"], place["offset"], place["length"]
        if not (is_whole(start) and is_whole(length) and 0 <= start < 2**62 and 0 <= length < 2**62):
            raise ValueError(f"{name}: the chunk at {list(offsets)} is nowhere")
        if path not in files:
            files[path] = inside(folder, path, folder / METADATA)
        chunks.append(Chunk(files[path], start, length, dtype, offsets, sizes))
    _refuse_gaps(name, shape, chunks)
    return DistributedTensor(name, dtype, shape, tuple(chunks))


def _shape(value: Any) -> Shape:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise ValueError("it is damaged: a size is not a few numbers")
    if not all(is_whole(size) and 0 <= size < 2**48 for size in value):
        raise ValueError(f"it is damaged: the size {list(value)}")
    return value


def _refuse_gaps(name: str, shape: Shape, chunks: Sequence[Chunk]) -> None:
    """Raises ValueError unless the chunks are within the tensor, do not overlap, and leave nothing out."""
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{name}: its chunks are not the whole tensor")
    begins = np.array([chunk.offsets for chunk in chunks], dtype=np.int64).reshape(len(chunks), len(shape))
    ends = begins + np.array([chunk.sizes for chunk in chunks], dtype=np.int64).reshape(len(chunks), len(shape))
    if (ends > np.array(shape, dtype=np.int64)).any():
        raise ValueError(f"{name}: a chunk is not within the tensor")
    for number in range(1, len(chunks)):
        apart = (ends[:number] <= begins[number]) | (begins[:number] >= ends[number])
        if not apart.any(axis=1).all():
            raise ValueError(f"{name}: two of its chunks overlap")


def _contiguous(sizes: Shape) -> Shape:
    strides, stride = [], 1
    for size in reversed(sizes):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))
