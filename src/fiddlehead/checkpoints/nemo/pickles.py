"""Reads the pickles in distributed checkpoints as data: no class or function that a pickle names is imported or called.

A pickle is a small program. This reader knows the few names that `torch.distributed.checkpoint` and `torch.save` write,
puts plain stand-ins in their place, and refuses every other name and every instruction that these pickles do not need.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from typing import Any


class RefusedError(ValueError):
    """A pickle has something that no writer of these files writes; the text begins with "it"."""


class Record:
    """An object of a pickle: the arguments that make it, and its state, as data."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = {}

    def __getitem__(self, name: str) -> Any:
        """The field of its state; raises RefusedError if there is none."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise RefusedError(f"{type(self).__name__} has no {name}")
        return self.state[name]

    def get(self, name: str) -> Any:
        """The field of its state, or None if there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Metadata(Record):
    """A checkpoint's metadata."""


class TensorStorage(Record):
    """A tensor: its properties, size and chunks."""


class BytesStorage(Record):
    """Something that is not a tensor."""


class ChunkStorage(Record):
    """A chunk of a tensor."""


class Index(Record):
    """The name of a tensor, and the offsets of a chunk of it."""


class StorageInfo(Record):
    """Where a chunk is."""


class Properties(Record):
    """The properties of a tensor; the first of its state is the dtype."""


class Other(Record):
    """An object that nobody asks."""


class Storage(Record):
    """The type of a tensor's storage in a `torch.save` file."""


class Tensor(Record):
    """A tensor in a `torch.save` file: storage, offset, size, strides."""


DTYPES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""For the names of torch's dtypes those of `safetensors_files.DTYPES`."""
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}
_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"


def _sequence(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _nothing(*_: Any) -> None:
    """In place of what is not needed."""


_METADATA_NAMES: Mapping[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): Metadata,
    (_METADATA, "TensorStorageMetadata"): TensorStorage,
    (_METADATA, "BytesStorageMetadata"): BytesStorage,
    (_METADATA, "ChunkStorageMetadata"): ChunkStorage,
    (_METADATA, "MetadataIndex"): Index,
    (_METADATA, "TensorProperties"): Properties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _nothing,
    (_METADATA, "StorageMeta"): Other,
    (_MEGATRON, "MCoreMetadata"): Metadata,
    (_MEGATRON, "MCoreSavePlan"): Other,
    # Megatron-core keeps the plans by which its ranks wrote.
    **{(_PLANNER, name): Other for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")},
    (_PLANNER, "WriteItemType"): _nothing,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch.serialization", "_get_layout"): _nothing,
    ("torch", "Size"): _sequence,
    ("pathlib", "PosixPath"): _nothing,
    ("pathlib", "PurePosixPath"): _nothing,
    ("pathlib", "WindowsPath"): _nothing,
    ("pathlib._local", "PosixPath"): _nothing,  # of Python 3.13
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}
_TENSOR_NAMES: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch.serialization", "_get_layout"): _nothing,
    ("collections", "OrderedDict"): lambda *_: {},
    **{("torch", name): type(name, (Storage,), {"dtype": dtype}) for name, dtype in _STORAGES.items()},
}

_REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.NEWOBJ_EX),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
)


_PythonUnpickler: Any = vars(pickle)["_Unpickler"]
"""Python's unpickler that is written in Python: what each instruction does can be replaced."""


class _Unpickler(_PythonUnpickler):
    """An unpickler in which everything is replaced that could import or call."""

    def __init__(self, data: bytes, names: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise RefusedError(f"it names {module}.{name}, which is not read")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._names is not _TENSOR_NAMES:
            raise RefusedError("it refers to something outside")
        return pid

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise RefusedError("it sets the state of something that has none")
        self.stack[-1].state = state

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not (isinstance(kind, type) and issubclass(kind, Record)) or not isinstance(arguments, tuple):
            raise RefusedError("it makes an object of no known class")
        self.append(kind(*arguments))

    def load_reduce(self) -> None:
        arguments, made_by = self.stack.pop(), self.stack.pop()
        if not any(made_by is each for each in self._names.values()) or not isinstance(arguments, tuple):
            raise RefusedError("it calls something unknown")
        self.append(made_by(*arguments))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise RefusedError("it sets items of something that has none")
        if not all(isinstance(key, str | Index) for key in items[::2]):  # others might take long to hash
            raise RefusedError("it has keys that are not texts")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch = {  # noqa: RUF012
        **{code: function for code, function in _PythonUnpickler.dispatch.items() if bytes([code]) not in _REFUSED},
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.REDUCE[0]: load_reduce,
        pickle.SETITEMS[0]: load_setitems,
        pickle.SETITEM[0]: load_setitem,
        pickle.DICT[0]: load_dict,
    }


_DAMAGES = (
    *(pickle.UnpicklingError, EOFError, IndexError, AttributeError, TypeError, ValueError, OverflowError),
    *(MemoryError, RecursionError, struct.error),
)
"""What Python's unpickler raises for a pickle that is not whole."""


def read_metadata(data: bytes) -> Metadata:
    """The metadata of a distributed checkpoint; raises RefusedError if it is anything else."""
    found = _read(data, _METADATA_NAMES)
    if not isinstance(found, Metadata):
        raise RefusedError("it is not the metadata of a distributed checkpoint")
    return found


def read_tensor(data: bytes) -> Tensor:
    """The tensor that the `data.pkl` of a `torch.save` file describes; raises RefusedError if it is anything else."""
    found = _read(data, _TENSOR_NAMES)
    if not isinstance(found, Tensor):
        raise RefusedError("it is not a tensor")
    return found


def _read(data: bytes, names: Mapping[tuple[str, str], Any]) -> Any:
    try:
        return _Unpickler(data, names).load()
    except RefusedError:
        raise
    except KeyError as error:
        raise RefusedError(f"it has an instruction that is not read: {error}") from None
    except _DAMAGES as error:
        raise RefusedError(f"it is damaged: {str(error) or type(error).__name__}") from None
