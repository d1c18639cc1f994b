"""The pickles in distributed checkpoints are data: whatever else they hold is refused, and nothing in them is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddlehead.checkpoints.nemo.pickles import Metadata, RefusedError, read_metadata, read_tensor
from tests.checkpoints.nemo.megatron import write


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = write(tmp_path_factory.mktemp("checkpoint"), {"a": torch.arange(6.0).view(2, 3)}, None)
    return (folder / "weights/.metadata").read_bytes()


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def test_the_metadata_of_torch_is_read(metadata: bytes) -> None:
    found = read_metadata(metadata)
    assert isinstance(found, Metadata)
    assert set(found["state_dict_metadata"]) >= {"a"}
    assert found["state_dict_metadata"]["a"]["size"] == (2, 3)


@pytest.mark.parametrize(
    "hostile",
    [
        Calls(os.system, "touch hacked"),
        Calls(eval, "1/0"),
        Calls(getattr, "", "join"),
        Calls(open, "/etc/passwd"),
        Calls(torch.load, "x"),
        Calls(Path.home),
        Calls(OrderedDict),
        {"deep": Calls(exec, "1/0")},
        [1, 2, 3],
        {(1, 2): 3},
        {1, 2},
        b"bytes",
        None,
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("read", [read_metadata, read_tensor])
def test_other_pickles_are_refused(hostile: Any, protocol: int, read: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedError, match="it "):
        read(pickle.dumps(hostile, protocol=protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"garbage",
        b"\x80\x04.",
        b"\x80\x05\x96" + b"\xff" * 8 + b".",  # an array of 2**64 bytes
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f.",  # a text of as many
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo of 2**31 entries
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02(S'a'\nios\nsystem\n.",
        b"\x80\x02ctorch\nSize\n(lt\x81.",  # a class that is a function here
        b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",  # a state for it
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x08\x00\x00\x00__init__K\x01sb.",
        b"\x80\x02Vpath\nQ.",
        b"(" * 10_000 + b"t" * 10_000 + b"}" + b"0.",
    ],
)
def test_programs_that_no_writer_writes_are_refused(program: bytes) -> None:
    for read in (read_metadata, read_tensor):
        with pytest.raises(RefusedError, match="it "):
            read(program)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_refused_or_harmless(metadata: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(metadata) - 1))
    damaged = bytearray(metadata)
    damaged[at] = data.draw(st.integers(0, 255))
    for attempt in (bytes(damaged), metadata[:at]):
        with contextlib.suppress(RefusedError):
            read_metadata(attempt)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_the_description_of_a_saved_tensor_is_read(dtype: torch.dtype) -> None:
    file = io.BytesIO()
    torch.save(torch.ones(4, 3, dtype=dtype).T, file)
    with zipfile.ZipFile(file) as archive:
        found = read_tensor(archive.read("archive/data.pkl"))
    (_, kind, key, _, numbers), offset, sizes, strides, *_ = found.arguments
    assert (key, numbers, offset, sizes, strides) == ("0", 12, 0, (3, 4), (1, 3))
    assert kind.dtype in ("F64", "F32", "BF16", "F16", "I64", "BOOL")
