"""Many ranks train what one does, and save what any number of them can go on from."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from fiddlehead import tasks
from fiddlehead.data import FineTuningDataModule
from fiddlehead.errors import ConfigError, StopRequested
from fiddlehead.grouped_query import convert_gqa
from fiddlehead.huggingface import export_checkpoint
from fiddlehead.models import LoRA, Transformer
from fiddlehead.models.safetensors_files import read_header, to_write, write_file
from fiddlehead.runs import RunDirectory, StopRequest
from fiddlehead.text import Writer
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel, checkpoint_io
from fiddlehead.training.checkpoint_folder import CheckpointNotWrittenError, verify, write_folder, write_state
from fiddlehead.training.checkpoint_io import deal
from fiddlehead.training.parallel import Sizes
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


def test_one_device_is_trained_on_as_without_a_strategy(dataset: Path, tmp_path: Path, one: Path) -> None:
    tasks.pretrain(**make_parts(dataset, tmp_path, strategy=Parallel(), **TRAINED))
    assert torch.equal(losses(tmp_path / "run"), losses(one / "plain"))


@pytest.mark.parametrize(("precision", "stored"), [("bf16-mixed", "F32"), ("bf16-true", "BF16")])
def test_bfloat16_is_close_to_one_process_s(dataset: Path, tmp_path: Path, precision: str, stored: str) -> None:
    runs = [train(layout, dataset, tmp_path / layout, precision=precision) for layout in ("1", "hsdp-2x2")]
    torch.testing.assert_close(losses(runs[1])[:, 0], losses(runs[0])[:, 0], rtol=1e-2, atol=0)
    weights = open_weights(runs[1])
    assert {weights.dtype("layers.0.mlp.linear_fc1.weight")} == {stored}


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


def tune(base: Path, runs: Path, examples: Path, lora: LoRA | None, devices: int = 1) -> str:
    """Learns preferences, or answers, on the ranks that call this; what it prints."""
    preference = examples.stem == "pairs"
    model = (PreferenceModel if preference else LanguageModel)(init_from=base, lora=lora)
    made = make_parts(base, runs, max_steps=8, devices=devices, **({"strategy": Parallel()} if devices > 1 else {}))
    data = FineTuningDataModule(
        examples, seq_length=16, micro_batch_size=2, global_batch_size=4, val_samples=8, preference=preference
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        tasks.finetune(**made | {"model": model, "data": data})
    return out.getvalue()


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ["pairs", "answers"])
def test_ranks_learn_answers_and_preferences_as_one_process_does(
    one: Path, tmp_path: Path, name: str, lora: LoRA | None
) -> None:
    examples = tmp_path / f"{name}.jsonl"
    words = ["fern", "moss", "leaf", "spore", "frond"]
    pairs = [{"prompt": a, "chosen": b, "rejected": a} for a in words for b in words * 2]
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    examples.write_text("".join(json.dumps(line) + "\n" for line in (pairs if name == "pairs" else answers)))
    alone = tune(one / "plain", tmp_path / "one", examples, lora)
    printed, silence = on_ranks(2, tune, one / "plain", tmp_path / "many", examples, lora, devices=2)
    found, expected = losses(tmp_path / "many" / "run"), losses(tmp_path / "one" / "run")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    asked = [line for line in alone.splitlines() if "it answers" in line]
    assert asked == [line for line in printed.splitlines() if "it answers" in line]
    assert len(asked) == 2 and not silence


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


def test_ranks_go_on_from_the_same_checkpoint(dataset: Path, one: Path, tmp_path: Path) -> None:
    """The first rank finds what is damaged, and the others do as it does."""
    run = train("fsdp-2", dataset, tmp_path)
    file = run / "checkpoints" / "step-00000020" / "optimizer-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train("fsdp-2", dataset, tmp_path)
    assert verify(run / "checkpoints" / "step-00000020")
    assert losses(run).shape == (22, 3)
    with pytest.raises(AssertionError, match="resume='never', but"):
        train("fsdp-2", dataset, tmp_path, resume="never")


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


# -- written meanwhile


class Disk:
    """A disk that is slow, so that a run goes on meanwhile; or that is full from a step on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, full_from: int | None = None, rank: int = 0) -> None:
        self.full_from, self.rank = full_from, rank
        self.written: list[int] = []
        self.write_file = checkpoint_io.write_file
        monkeypatch.setattr(checkpoint_io, "write_file", self)

    def __call__(self, file: Path, *arguments: Any, **named: Any) -> Any:
        step = int(file.parent.name.rpartition("-")[2])
        time.sleep(0.2)
        if self.full_from is not None and step >= self.full_from and int(os.environ.get("RANK", 0)) == self.rank:
            raise OSError(28, "No space left on device")
        written = self.write_file(file, *arguments, **named)
        self.written.append(step)
        return written


class Progress(Callback):
    """Notes at which steps a checkpoint was begun and not yet written, and may end the process there."""

    def __init__(self, directory: Path, *, die: bool = False) -> None:
        self.directory, self.die = directory, die
        self.meanwhile: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > 8 and list(self.directory.glob(".writing-*")):
            self.meanwhile.append(trainer.global_step)
            if self.die:
                os._exit(9)


def test_a_checkpoint_is_written_while_the_run_goes_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, disk = Progress(tmp_path / "run" / "checkpoints"), Disk(monkeypatch)
    made = make_parts(dataset, tmp_path, asynchronous=True, max_steps=16, callbacks=[progress])
    tasks.pretrain(**made)
    assert 9 in progress.meanwhile
    assert disk.written == [4, 4, 8, 8, 12, 12, 16, 16]
    assert all(verify(path) for path in (tmp_path / "run" / "checkpoints").iterdir())


def die_meanwhile(dataset: Path, runs: Path) -> None:
    """Trains until a checkpoint is being written, and ends there without a word."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch)
        progress = Progress(runs / "run" / "checkpoints", die=True)
        changes = {"strategy": Parallel(), "devices": 2, "global_batch_size": 8, "asynchronous": True}
        tasks.pretrain(**make_parts(dataset, runs, callbacks=[progress], **changes))


def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 9"):
        on_ranks(2, die_meanwhile, dataset, tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".writing-step-00000008", "best", "step-00000004"]
    assert tasks.resume_point(RunDirectory(tmp_path / "run"), "auto") == folder / "step-00000004"


def fill_disk(dataset: Path, runs: Path, asynchronous: bool, rank: int) -> str:
    """What the run ends with, on a disk that is full from step 8 on for one of the ranks."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, full_from=8, rank=rank)
        changes = {"strategy": Parallel(), "devices": 2, "global_batch_size": 8, "asynchronous": asynchronous}
        with pytest.raises(CheckpointNotWrittenError) as error:
            tasks.pretrain(**make_parts(dataset, runs, max_steps=16, **changes))
    return str(error.value)


@pytest.mark.parametrize(("asynchronous", "rank"), [(False, 1), (True, 0)])
def test_a_disk_that_is_full_for_one_rank_ends_the_run_on_all(
    dataset: Path, tmp_path: Path, asynchronous: bool, rank: int
) -> None:
    answers = on_ranks(2, fill_disk, dataset, tmp_path, asynchronous, rank)
    folder = tmp_path / "run" / "checkpoints"
    assert answers[rank] == f"{folder}/step-00000008: No space left on device"
    assert answers[1 - rank] == f"{folder}/step-00000008: rank {rank}: [Errno 28] No space left on device"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-00000004"]


class Ask(Callback):
    """Asks the run to stop, in the middle of a step."""

    def __init__(self, run: RunDirectory, step: int) -> None:
        self.run, self.step = run, step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step + 1 == self.step:
            self.run.request_stop(StopRequest("by me"))


def stop(dataset: Path, runs: Path) -> str:
    """What a run that is asked to stop ends with."""
    changes = {"strategy": Parallel(), "devices": 2, "global_batch_size": 8, "asynchronous": True}
    callbacks = [Ask(RunDirectory(runs / "run"), 6)]
    with pytest.raises(StopRequested) as stopped:
        tasks.pretrain(**make_parts(dataset, runs, callbacks=callbacks, **changes))
    return str(stopped.value)


def test_all_ranks_stop_after_the_same_step_and_save_it(dataset: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, stop, dataset, tmp_path)
    assert first == "stopped after step 6, which is saved: by me"
    assert second == "stopped after step 6, which is saved: as the first rank was asked to"
    assert verify(tmp_path / "run" / "checkpoints" / "step-00000006")["step"] == 6


# -- sizes


@pytest.mark.parametrize(
    ("strategy", "devices", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 8, (1, 8, 1, 1)),
        ({"data_parallel": 8}, 8, (1, 8, 1, 1)),
        ({"data_parallel_replicate": 2}, 8, (2, 4, 1, 1)),
    ],
)
def test_the_data_parallel_ranks_are_what_the_devices_allow(
    strategy: dict[str, int], devices: int, sizes: tuple[int, ...]
) -> None:
    assert Parallel(**strategy).sizes(devices).mesh == sizes


def test_ranks_that_share_a_layer_or_a_sequence_train_on_the_same_samples() -> None:
    sizes = Sizes(data=4, replicate=2, context=2, tensor=2)
    mesh = torch.arange(16).view(sizes.mesh)
    assert [sizes.data_rank(rank) for rank in range(16)] == [rank // 4 for rank in range(16)]
    assert {sizes.data_rank(int(rank)) for rank in mesh[1, 0].flatten()} == {2}


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel=3 x context_parallel=1 does not divide the 8 devices; allowed: a"),
        ({"data_parallel": 4}, "data_parallel=4: with tensor_parallel=1 and context_parallel=1, 8 devices make it 8"),
        ({"data_parallel_replicate": 3}, "data_parallel_replicate=3 does not divide the 8 .*; allowed: 1, 2, 4, 8"),
        ({"tensor_parallel": 2}, "tensor_parallel=2, context_parallel=1: allowed so far: 1"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(strategy: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Parallel(**strategy).sizes(8)
    with pytest.raises(ConfigError, match="data_parallel=0: must be 1 or more"):
        Parallel(data_parallel=0)
