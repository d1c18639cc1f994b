"""A checkpoint of many ranks can be resumed by any number of ranks, and is complete or absent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from fiddlehead import tasks
from fiddlehead.checkpoints import io as checkpoint_io
from fiddlehead.checkpoints.folder import CheckpointNotWrittenError, verify, write_folder, write_state
from fiddlehead.checkpoints.grouped_query import convert_gqa
from fiddlehead.checkpoints.huggingface.convert import export_checkpoint
from fiddlehead.checkpoints.io import deal
from fiddlehead.checkpoints.safetensors_files import lazy_tensors, read_header, write_file
from fiddlehead.checkpoints.weights import PREFIX, open_weights
from fiddlehead.errors import StopRequested
from fiddlehead.inference.text import Writer
from fiddlehead.models import LoRA, Transformer
from fiddlehead.plan.resume import resume_point
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import StopRequest
from fiddlehead.training import Parallel
from tests.training.conftest import make_parts, parameters
from tests.training.layouts import SETTINGS, losses, train
from tests.training.ranks import on_ranks


@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [
        ("fsdp-2", "1", "plain"),
        ("1", "fsdp-2", "plain"),
        pytest.param("fsdp-2", "hsdp-2x2", "plain", marks=pytest.mark.long),
        pytest.param("hsdp-2x2", "fsdp-2", "plain", marks=pytest.mark.long),
        pytest.param("fsdp-4", "1", "plain", marks=pytest.mark.long),
        ("1", "tp-2", "plain"),
        pytest.param("fsdp-2-tp-2", "fsdp-2", "plain", marks=pytest.mark.long),
        pytest.param("tp-4", "ep-2", "experts", marks=pytest.mark.long),
        ("fsdp-2-ep-2", "1", "experts"),
        ("pp-2-twice", "pp-2", "deep"),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    dataset: Path, one: Callable[[str], Path], tmp_path: Path, before: str, after: str, settings: str
) -> None:
    train(before, dataset, tmp_path, killed_after=4, **SETTINGS[settings])
    run = train(after, dataset, tmp_path, **SETTINGS[settings])
    torch.testing.assert_close(losses(run), losses(one(settings)), rtol=1e-5, atol=0)
    expected = parameters(RunDirectory(one(settings)), 6)
    found = parameters(RunDirectory(run), 6)
    assert found.keys() == expected.keys()
    for name in expected:
        # As a whole: where a gradient is next to nothing, Adam makes much of how it was rounded.
        assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("layout", "asynchronous", "precision"),
    [
        ("1", True, "32-true"),
        ("fsdp-2", False, "bf16-mixed"),
        ("tp-2", True, "bf16-mixed"),
        pytest.param("fsdp-2", True, "bf16-true", marks=pytest.mark.long),
        pytest.param("hsdp-2x2", True, "32-true", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_goes_on_exactly(
    dataset: Path, tmp_path: Path, layout: str, asynchronous: bool, precision: str
) -> None:
    settings: dict[str, Any] = {"hidden_dropout": 0.1, "precision": precision}
    whole = train(layout, dataset, tmp_path, name="whole", **settings)
    settings["asynchronous"] = asynchronous
    train(layout, dataset, tmp_path, killed_after=4, **settings)
    run = train(layout, dataset, tmp_path, **settings)
    assert torch.equal(losses(run), losses(whole))
    for step in ("step-00000003", "step-00000006"):
        files = {file.name for file in (whole / "checkpoints" / step).iterdir()}
        assert files == {file.name for file in (run / "checkpoints" / step).iterdir()}
        for name in files - {"state.json"}:
            ours, theirs = (folder / "checkpoints" / step / name for folder in (run, whole))
            assert ours.read_bytes() == theirs.read_bytes(), name


def test_ranks_go_on_from_the_same_checkpoint(dataset: Path, one: Callable[[str], Path], tmp_path: Path) -> None:
    """The first rank finds what is damaged, and the others do as it does."""
    run = train("fsdp-2", dataset, tmp_path)
    file = run / "checkpoints" / "step-00000006" / "optimizer-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train("fsdp-2", dataset, tmp_path)
    assert verify(run / "checkpoints" / "step-00000006")
    assert losses(run).shape == (8, 3)
    with pytest.raises(AssertionError, match=r"resume='never': .* would be lost"):
        train("fsdp-2", dataset, tmp_path, resume="never")


def test_each_rank_writes_a_part_in_whole_tensors(dataset: Path, one: Callable[[str], Path], tmp_path: Path) -> None:
    run = train("fsdp-4", dataset, tmp_path)
    folder, alone = (path / "checkpoints" / "step-00000006" for path in (run, one("plain")))
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


def test_adapters_go_on_with_another_number_of_ranks(dataset: Path, one: Callable[[str], Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"init_from": one("plain"), "lora": LoRA(rank=2, dora=True)}
    whole = train("1", dataset, tmp_path, name="whole", **settings)
    train("fsdp-2", dataset, tmp_path, killed_after=4, **settings)
    run = train("1", dataset, tmp_path, **settings)
    torch.testing.assert_close(losses(run), losses(whole), rtol=1e-5, atol=0)
    train("1", dataset, tmp_path, name="other", killed_after=4, **settings)
    other = train("fsdp-2", dataset, tmp_path, name="other", **settings)
    torch.testing.assert_close(losses(other), losses(whole), rtol=1e-5, atol=0)
    assert all("lora_" in name or "magnitude" in name for name in parameters(RunDirectory(other), 6))


def test_a_sharded_checkpoint_is_exported_as_a_whole_one_is(dataset: Path, tmp_path: Path) -> None:
    run = train("fsdp-2", dataset, tmp_path)
    weights = open_weights(run)
    with torch.device("meta"):
        names = list(Transformer(weights.config).state_dict())
    copy = tmp_path / "copy"
    with write_folder(copy) as folder:
        tensors = lazy_tensors({PREFIX + name: weights.load(name) for name in names})
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
    assert resume_point(RunDirectory(tmp_path / "run"), "auto") == folder / "step-00000004"


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
