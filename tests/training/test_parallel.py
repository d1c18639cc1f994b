"""Many ranks train what one does, and save what any number of them can go on from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from fiddlehead import tasks
from fiddlehead.grouped_query import convert_gqa
from fiddlehead.huggingface import export_checkpoint
from fiddlehead.models import LoRA, Transformer
from fiddlehead.models.safetensors_files import read_header, to_write, write_file
from fiddlehead.runs import RunDirectory
from fiddlehead.text import Writer
from fiddlehead.training import Parallel
from fiddlehead.training.checkpoint_folder import verify, write_folder, write_state
from fiddlehead.training.checkpoint_io import deal
from fiddlehead.training.weights import PREFIX, open_weights
from tests.training.conftest import KillAfter, Killed, make_parts, parameters, rows
from tests.training.ranks import on_ranks

TRAINED = {"max_steps": 20, "global_batch_size": 16, "micro_batch_size": 2, "val_check_interval": 10}
TRAINED |= {"every_n_steps": 10}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "fsdp-2": (2, {}),
    "fsdp-4": (4, {"reshard_after_forward": False}),
    "hsdp-2x2": (4, {"data_parallel_replicate": 2}),
}
SETTINGS = {
    "plain": {},
    "documents": {"separate_documents": True},
    "experts": {"num_moe_experts": 4, "attention_sinks": True, "add_bias_linear": True},
}


def train(layout: str, dataset: Path, runs: Path, *, killed_after: int | None = None, **changes: Any) -> Path:
    """Trains on as many ranks as `layout` has, and returns the run's folder."""
    devices, strategy = LAYOUTS[layout]
    arguments = (strategy, dataset, runs, killed_after)
    changes = TRAINED | changes | {"devices": devices}
    if devices == 1:
        train_here(*arguments, **changes)
    else:
        on_ranks(devices, train_here, *arguments, **changes)
    return runs / changes.get("name", "run")


def train_here(
    strategy: dict[str, Any], dataset: Path, runs: Path, killed_after: int | None = None, **changes: Any
) -> None:
    """Trains on the ranks that call this."""
    if changes["devices"] > 1:
        changes["strategy"] = Parallel(**strategy)
    if killed_after is None:
        tasks.pretrain(**make_parts(dataset, runs, **changes))
    else:
        with pytest.raises(Killed):
            tasks.pretrain(**make_parts(dataset, runs, callbacks=[KillAfter(killed_after)], **changes))


def losses(run: Path) -> torch.Tensor:
    """Loss, gradient norm and validation loss of each step."""
    values = [[float(value or 0) for value in row] for row in rows(RunDirectory(run), "loss", "grad_norm", "val_loss")]
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def one(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, by the name of their settings."""
    runs = tmp_path_factory.mktemp("one")
    for name, settings in SETTINGS.items():
        train("1", dataset, runs, name=name, **settings)
    return runs


# -- training


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-4", "hsdp-2x2"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_losses_are_those_of_one_process(
    dataset: Path, one: Path, tmp_path: Path, layout: str, settings: str
) -> None:
    run = train(layout, dataset, tmp_path, **SETTINGS[settings])
    assert losses(run).shape == (22, 3)
    torch.testing.assert_close(losses(run), losses(one / settings), rtol=1e-5, atol=0)


class Start(Callback):
    """Keeps what a run begins with, and ends it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = {name: tensor.detach() for name, tensor in pl_module.named_parameters()}
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        self.parameters = {name: tensor.float().numpy() for name, tensor in whole.items()}
        self.elements = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors.values())
        raise Killed


def start(dataset: Path, runs: Path, **changes: Any) -> tuple[dict[str, Any], int]:
    """What a run begins with, and how many elements of it this rank holds."""
    kept = Start()
    if changes.get("devices", 1) > 1:
        changes["strategy"] = Parallel()
    with pytest.raises(Killed):
        tasks.pretrain(**make_parts(dataset, runs, callbacks=[kept], **changes))
    return kept.parameters, kept.elements


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16-true"},
        {"num_moe_experts": 4, "add_bias_linear": True, "attention_sinks": True, "normalization": "LayerNorm"},
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
        {"layernorm_zero_centered_gamma": True, "norm_placement": "both", "qk_layernorm": "head"},
        {"init_from": "plain"},
        {"init_from": "plain", "lora": LoRA(rank=2, dora=True)},
        {"init_from": "plain", "lora": LoRA(rank=2), "precision": "bf16-true"},
    ],
    ids=["plain", "bf16-true", "experts", "learned-tied", "zero-centered", "weights", "dora", "lora-bf16"],
)
def test_ranks_begin_with_parts_of_what_one_process_begins_with(
    dataset: Path, one: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "init_from" in changes:
        changes = changes | {"init_from": one / changes["init_from"]}
    whole, elements = start(dataset, tmp_path / "one", **changes)
    of_ranks = on_ranks(2, start, dataset, tmp_path / "many", devices=2, global_batch_size=8, **changes)
    for parts, _ in of_ranks:
        assert parts.keys() == whole.keys()
        assert all((parts[name] == whole[name]).all() for name in whole)
    held = [count for _, count in of_ranks]
    assert sum(held) == elements and min(held) > 0.4 * elements


# -- checkpoints


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp-2", "1"), ("1", "fsdp-2"), ("fsdp-2", "hsdp-2x2"), ("hsdp-2x2", "fsdp-2"), ("fsdp-4", "1")],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    dataset: Path, one: Path, tmp_path: Path, before: str, after: str
) -> None:
    train(before, dataset, tmp_path, killed_after=13)
    run = train(after, dataset, tmp_path)
    torch.testing.assert_close(losses(run), losses(one / "plain"), rtol=1e-5, atol=0)
    expected = parameters(RunDirectory(one / "plain"), 20)
    found = parameters(RunDirectory(run), 20)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("layout", ["1", "hsdp-2x2"])
def test_a_killed_run_goes_on_exactly(dataset: Path, tmp_path: Path, layout: str, asynchronous: bool) -> None:
    settings = {"asynchronous": asynchronous, "hidden_dropout": 0.1}
    whole = train(layout, dataset, tmp_path, name="whole", hidden_dropout=0.1)
    train(layout, dataset, tmp_path, killed_after=13, **settings)
    run = train(layout, dataset, tmp_path, **settings)
    assert torch.equal(losses(run), losses(whole))
    for step in ("step-00000010", "step-00000020"):
        files = {file.name for file in (whole / "checkpoints" / step).iterdir()}
        assert files == {file.name for file in (run / "checkpoints" / step).iterdir()}
        for name in files - {"state.json"}:
            ours, theirs = (folder / "checkpoints" / step / name for folder in (run, whole))
            assert ours.read_bytes() == theirs.read_bytes(), name


def test_each_rank_writes_a_part_in_whole_tensors(dataset: Path, one: Path, tmp_path: Path) -> None:
    run = train("fsdp-4", dataset, tmp_path)
    folder, alone = (path / "checkpoints" / "step-00000020" for path in (run, one / "plain"))
    verify(folder)
    for kind in ("model", "optimizer"):
        files = sorted(folder.glob(f"{kind}-*-of-*.safetensors"))
        assert 2 < len(files) <= 4
        assert [file.name for file in files] == [
            f"{kind}-{number + 1:05}-of-{len(files):05}.safetensors" for number in range(len(files))
        ]
        shares = [read_header(file) for file in files]
        whole = read_header(alone / f"{kind}.safetensors")
        assert {name: t.shape for share in shares for name, t in share.items()} == {
            n: t.shape for n, t in whole.items()
        }
        sizes = [tensor.nbytes for tensor in whole.values()]
        assert max(sum(t.nbytes for t in share.values()) for share in shares) <= sum(sizes) / 4 + max(sizes)
    assert {file.name[:5] for file in folder.iterdir()} == {"model", "optim", "state"}


@pytest.mark.parametrize(
    ("sizes", "ranks", "shares"),
    [
        ([], 3, [[]]),
        ([1], 3, ["a"]),
        ([0, 0], 2, ["ab"]),
        ([1, 1, 1, 1], 2, ["ab", "cd"]),
        ([9, 1, 1, 1], 2, ["a", "bcd"]),
        ([1, 1, 1, 9], 4, ["abc", "d"]),
    ],
)
def test_tensors_are_dealt_out_by_their_bytes(sizes: list[int], ranks: int, shares: list) -> None:
    assert deal(dict(zip("abcd", sizes, strict=False)), ranks) == [list(share) for share in shares]


def test_adapters_go_on_with_another_number_of_ranks(dataset: Path, one: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"init_from": one / "plain", "lora": LoRA(rank=2, dora=True)}
    whole = train("1", dataset, tmp_path, name="whole", **settings)
    train("fsdp-2", dataset, tmp_path, killed_after=13, **settings)
    run = train("1", dataset, tmp_path, **settings)
    torch.testing.assert_close(losses(run), losses(whole), rtol=1e-5, atol=0)
    train("1", dataset, tmp_path, name="other", killed_after=13, **settings)
    other = train("fsdp-2", dataset, tmp_path, name="other", **settings)
    torch.testing.assert_close(losses(other), losses(whole), rtol=1e-5, atol=0)
    assert all("lora_" in name or "magnitude" in name for name in parameters(RunDirectory(other), 20))


def test_a_sharded_checkpoint_is_exported_as_a_whole_one_is(dataset: Path, tmp_path: Path) -> None:
    run = train("fsdp-2", dataset, tmp_path)
    weights = open_weights(run)
    with torch.device("meta"):
        names = list(Transformer(weights.config).state_dict())
    copy = tmp_path / "copy"
    with write_folder(copy) as folder:
        tensors = to_write({PREFIX + name: weights.load(name) for name in names})
        write_file(folder / "model.safetensors", tensors)
        write_state(folder, {"config": asdict(weights.config), "step": 20})
    for source, out in ((run, "sharded"), (copy, "whole")):
        export_checkpoint(source, tmp_path / out, progress=False)
    exported = [load_file(tmp_path / out / "model.safetensors") for out in ("sharded", "whole")]
    assert exported[0].keys() == exported[1].keys() and len(exported[0]) > len(names)
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    assert "".join(Writer.open(run).write("fern", 3))
    convert_gqa(run, tmp_path / "pooled", 1, progress=False)
