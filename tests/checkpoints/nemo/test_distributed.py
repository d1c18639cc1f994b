"""Distributed checkpoints, as PyTorch writes them, and damaged or hostile ones."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from fiddlehead.checkpoints.nemo.distributed import read_distributed
from fiddlehead.errors import ConfigError
from tests.checkpoints.nemo.megatron import write

WHOLE = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)


def change(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Changes the metadata; only this test unpickles it."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def in_chunks(folder: Path, cuts: list[tuple[slice, ...]], whole: torch.Tensor = WHOLE) -> Path:
    """A checkpoint of one tensor whose chunks several ranks would have written."""
    parts = {f"part{number}": whole[cut].clone() for number, cut in enumerate(cuts)}
    weights = write(folder, parts, None) / "weights"

    def merge(metadata: Any) -> None:
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        chunks, merged = [], entries["part0"]
        for number, cut in enumerate(cuts):
            name = f"part{number}"
            place = storage.pop(next(index for index in storage if index.fqn == name))
            offsets = torch.Size(each.start or 0 for each in cut)
            chunks.append(ChunkStorageMetadata(offsets, entries[name].size))
            storage[MetadataIndex("whole", offsets)] = place
            del entries[name]
        entries["whole"] = replace(merged, size=whole.shape, chunks=chunks)

    change(weights, merge)
    return weights


CUTS = [
    [(slice(0, 2), slice(0, 6), slice(0, 5)), (slice(2, 4), slice(0, 6), slice(0, 5))],  # pipeline stages
    [(slice(0, 4), slice(0, 3), slice(0, 5)), (slice(0, 4), slice(3, 6), slice(0, 5))],  # ranks that share the rows
    [(slice(n, n + 1), slice(0, 6), slice(m, m + 5 - 2 * m)) for n in range(4) for m in (0,)],
    [(slice(n, n + 2), slice(0, 6), slice(*c)) for n in (0, 2) for c in ((0, 2), (2, 5))],  # both, by the columns
]


@pytest.mark.parametrize("cuts", CUTS)
def test_the_chunks_of_several_ranks_are_one_tensor(cuts: list[tuple[slice, ...]], tmp_path: Path) -> None:
    tensor = read_distributed(in_chunks(tmp_path, cuts))["whole"]
    assert torch.equal(tensor.load(), WHOLE)
    for layer in range(4):
        assert torch.equal(tensor.load((layer,)), WHOLE[layer])
        assert torch.equal(tensor.load((layer, 4)), WHOLE[layer, 4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_every_layout_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "plain": WHOLE.to(dtype),
        "transposed": WHOLE.to(dtype).transpose(0, 2),
        "permuted": WHOLE.to(dtype).permute(1, 2, 0),
        "part": WHOLE.to(dtype)[1:3],
        "one": torch.ones(1, 1, dtype=dtype),
        "scalar": torch.tensor(3.0, dtype=dtype),
        "empty": torch.ones(2, 0, dtype=dtype),
    }
    found = read_distributed(write(tmp_path, tensors, None) / "weights")
    for name, tensor in tensors.items():
        assert found[name].load().dtype == dtype and torch.equal(found[name].load(), tensor)
        if tensor.dim() == 3:
            assert torch.equal(found[name].load((1,)), tensor[1])


def _storage(metadata: Any) -> Any:
    return next(place for index, place in metadata.storage_data.items() if index.fqn == "whole")


def _chunk(metadata: Any, **changes: Any) -> None:
    entry = metadata.state_dict_metadata["whole"]
    entry.chunks[0] = replace(entry.chunks[0], **changes)


def _size(metadata: Any, *size: int) -> None:
    entry = metadata.state_dict_metadata["whole"]
    entry.size = torch.Size(size)
    _chunk(metadata, sizes=torch.Size(size))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: setattr(_storage(m), "relative_path", "../other/__0_0.distcp"), "is not in the folder"),
        (lambda m: setattr(_storage(m), "relative_path", "/etc/passwd"), "is not in the folder"),
        (lambda m: setattr(_storage(m), "relative_path", "none.distcp"), "No such file"),
        (lambda m: setattr(_storage(m), "offset", 10**12), "is cut short"),
        (lambda m: setattr(_storage(m), "length", 10**15), "is cut short"),
        (lambda m: setattr(_storage(m), "offset", -5), "is nowhere"),
        (lambda m: setattr(_storage(m), "offset", _storage(m).offset + 4), "is not a tensor as torch.save writes it"),
        (lambda m: setattr(_storage(m), "transform_descriptors", ["zstd"]), "is compressed or encrypted"),
        (lambda m: m.storage_data.clear(), "the chunk at"),
        (lambda m: _size(m, 2**40, 2**40), "whole"),
        (lambda m: _size(m, 4, 6, 6), "says F32"),
        (lambda m: _size(m, 6, 4, 5), "says F32"),
        (lambda m: _size(m, -1, 6, 5), "is damaged"),
        (lambda m: _chunk(m, sizes=torch.Size([4, 6, 4])), "its chunks are not the whole tensor"),
        (lambda m: _chunk(m, offsets=torch.Size([1, 0, 0])), "nowhere"),
        (lambda m: setattr(m.state_dict_metadata["whole"], "size", torch.Size([4, 5, 6])), "not within the tensor"),
        (lambda m: setattr(m.state_dict_metadata["whole"], "chunks", []), "its chunks are not the whole tensor"),
        (lambda m: setattr(m.state_dict_metadata["whole"], "chunks", None), "it is damaged"),
        (lambda m: setattr(m, "state_dict_metadata", 5), "it is damaged"),
    ],
)
def test_what_the_metadata_says_is_checked_against_the_files(edit: Any, said: str, tmp_path: Path) -> None:
    weights = write(tmp_path, {"whole": WHOLE}, None) / "weights"
    change(weights, edit)
    with pytest.raises(ConfigError, match=said):
        read_distributed(weights)["whole"].load()


def test_chunks_that_overlap_are_refused(tmp_path: Path) -> None:
    weights = in_chunks(tmp_path, CUTS[0])

    def overlap(metadata: Any) -> None:
        storage, entry = metadata.storage_data, metadata.state_dict_metadata["whole"]
        offsets = torch.Size([1, 0, 0])
        storage[MetadataIndex("whole", offsets)] = _storage(metadata)
        entry.chunks[1] = replace(entry.chunks[1], offsets=offsets)

    change(weights, overlap)
    with pytest.raises(ConfigError, match="two of its chunks overlap"):
        read_distributed(weights)


@pytest.mark.parametrize("size", [0, 1, 100, 600, 1000])
def test_a_file_that_is_cut_is_refused(size: int, tmp_path: Path) -> None:
    weights = write(tmp_path, {"whole": WHOLE}, None) / "weights"
    (file,) = weights.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ConfigError, match=f"{file.name}: at byte"):
        read_distributed(weights)["whole"].load()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    weights = write(tmp_path / "one", {"whole": WHOLE}, None) / "weights"
    (file,) = weights.glob("*.distcp")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link that leads out of the folder"):
        read_distributed(weights)


def test_a_layer_of_a_large_tensor_is_read_alone(tmp_path: Path) -> None:
    large = torch.zeros(64, 1 << 16)  # 16 MB
    large[7] = 1
    tensor = read_distributed(write(tmp_path, {"large": large}, None) / "weights")["large"]
    tracemalloc.start()
    assert tensor.load((7,)).eq(1).all() and tensor.load((8,)).eq(0).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_the_plans_that_megatron_keeps_are_passed_over(tmp_path: Path) -> None:
    weights = write(tmp_path, {"whole": WHOLE}, None) / "weights"
    items = [_tensor_item("whole", WHOLE), _bytes_item("bytes")]
    change(weights, lambda metadata: setattr(metadata, "all_local_plans", [SavePlan(items)]))
    assert torch.equal(read_distributed(weights)["whole"].load(), WHOLE)


def _bytes_item(name: str) -> WriteItem:
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(5))


def _tensor_item(name: str, tensor: torch.Tensor) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.size())
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
