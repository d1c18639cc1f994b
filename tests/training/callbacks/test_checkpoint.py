"""Checkpoints: complete or absent, kept or deleted; loading one never runs code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file, save_file

from fiddlehead import tasks
from fiddlehead.checkpoints import folder as checkpoint_folder
from fiddlehead.checkpoints.folder import (
    CheckpointNotWrittenError,
    DamagedCheckpointError,
    newest_good,
    verified_by_first,
    verify,
)
from fiddlehead.checkpoints.io import SafetensorsIO
from fiddlehead.checkpoints.safetensors_files import read_header
from fiddlehead.errors import ConfigError
from fiddlehead.inference.text import Writer
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.team import Team
from fiddlehead.training import Checkpoint, CosineAnnealing, Parallel
from fiddlehead.training.callbacks import checkpoint as checkpoint_callback
from tests.training.conftest import KillAfter, Killed, Parts, make_parts, rows
from tests.training.ranks import on_ranks

Pretrain = Callable[..., RunDirectory]


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def state(steps: int = 3, size: int = 5) -> dict[str, Any]:
    """What Lightning hands over, after `steps` of a small optimizer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(size, size)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1 + 0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 3))
    for _ in range(steps):
        layer(torch.randn(size)).sum().backward()
        optimizer.step()
        schedule.step()
    return {
        "state_dict": dict(layer.state_dict()),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "config": {"num_layers": 1},
        "val_loss": 1 / 3,
        "global_step": steps,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step-00000003"
    SafetensorsIO().save_checkpoint(state(), path)
    return path


# -- what is written is what is read


def test_a_round_trip_is_exact(saved: Path) -> None:
    written, read = state(), SafetensorsIO().load_checkpoint(saved)
    for name, value in written.items():
        assert same(value, read[name]), name
    assert {file.name for file in saved.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_files_are_those_of_the_safetensors_package(tmp_path: Path, saved: Path) -> None:
    dtypes = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool]
    tensors = {f"{i % 3}.{dtype}": torch.ones(i, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    SafetensorsIO().save_checkpoint(state() | {"state_dict": tensors}, tmp_path / "step-1")
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "step-1" / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    optimizer = load_file(saved / "optimizer.safetensors")
    save_file(optimizer, tmp_path / "theirs.safetensors")
    assert (saved / "optimizer.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@given(st.data())
def test_a_part_of_a_tensor_is_read_alone(tmp_path_factory: Any, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    tensor = torch.arange(torch.tensor(shape).prod()).reshape(shape)
    file = tmp_path_factory.mktemp("part") / "model.safetensors"
    save_file({"before": torch.ones(3), "t": tensor}, file)
    edges = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    part = tuple(slice(*pair) for pair in edges)
    assert same(read_header(file)["t"].load(part), tensor[part])


@given(st.floats(allow_nan=False), st.dictionaries(st.integers() | st.text(max_size=3), st.none() | st.booleans()))
def test_any_plain_value_comes_back(tmp_path_factory: Any, number: float, keyed: dict[Any, Any]) -> None:
    path = tmp_path_factory.mktemp("round") / "step-1"
    SafetensorsIO().save_checkpoint(state() | {"val_loss": number, "lr_schedulers": [keyed]}, path)
    read = SafetensorsIO().load_checkpoint(path)
    assert same([number, keyed], [read["val_loss"], *read["lr_schedulers"]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_dtypes_shapes_and_strides_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"t": torch.arange(6).reshape(2, 3).to(dtype).T, "scalar": torch.ones((), dtype=dtype)}
    SafetensorsIO().save_checkpoint(state() | {"state_dict": tensors}, tmp_path / "step-1")
    assert same(tensors, SafetensorsIO().load_checkpoint(tmp_path / "step-1")["state_dict"])


def test_a_run_s_checkpoint_restores_parameters_optimizer_and_schedule(pretrain: Pretrain, parts: Parts) -> None:
    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.parameters = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self.optimizer = trainer.optimizers[0].state_dict()
            self.schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
            raise Killed

    run = pretrain(max_steps=8)
    keep = Keep()
    with pytest.raises(Killed):
        pretrain(max_steps=9, callbacks=[keep])
    read = SafetensorsIO().load_checkpoint(run.checkpoints / "step-00000008")
    assert same(keep.parameters, read["state_dict"])
    assert keep.optimizer["state"].keys() == read["optimizer_states"][0]["state"].keys()
    assert all(same(keep.optimizer["state"][i], s) for i, s in read["optimizer_states"][0]["state"].items())
    assert keep.schedule["last_epoch"] == read["lr_schedulers"][0]["last_epoch"] == 8


class Adds(Callback):
    """Keeps something in checkpoints by Lightning's other hook."""

    def __init__(self, value: Any) -> None:
        self.value, self.read = value, None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.value

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.read = checkpoint.get("mine")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_callbacks_add_to_a_checkpoint_comes_back(pretrain: Pretrain, asynchronous: bool) -> None:
    value = {"tensor": torch.arange(3.0), "keyed": {3: [1, 2.5, "x"]}}
    pretrain(max_steps=4, callbacks=[Adds(value)], asynchronous=asynchronous)
    later = Adds(None)
    pretrain(max_steps=5, callbacks=[later])
    assert same(later.read, value)


def test_what_callbacks_add_that_cannot_be_kept_is_said_once(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(max_steps=5, callbacks=[Adds(object())])
    assert capsys.readouterr().out.count("checkpoints do not keep what a callback adds as mine") == 1


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides:UserWarning")
def test_a_run_with_averaged_weights_goes_on_exactly_and_its_model_is_the_average(pretrain: Pretrain) -> None:
    """Lightning's callback keeps the weights in training beside `state_dict`, which has the average."""
    settings: dict[str, Any] = {"max_steps": 8, "lr_scheduler": CosineAnnealing(warmup_steps=2)}
    with pytest.raises(Killed):
        pretrain(**settings, callbacks=[EMAWeightAveraging(decay=0.5), KillAfter(6)])
    run = pretrain(**settings, callbacks=[EMAWeightAveraging(decay=0.5)])
    straight = pretrain(**settings, callbacks=[EMAWeightAveraging(decay=0.5)], name="straight")
    assert rows(run, "step", "loss", "val_loss") == rows(straight, "step", "loss", "val_loss")
    read = SafetensorsIO().load_checkpoint(run.checkpoints / "step-00000008")
    other = SafetensorsIO().load_checkpoint(straight.checkpoints / "step-00000008")
    assert same(read["state_dict"], other["state_dict"])
    assert not same(read["state_dict"], read["current_model_state"])


def test_loading_never_unpickles(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        pretrain(callbacks=[KillAfter(6)])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a checkpoint was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    run = pretrain()
    assert verify(run.checkpoints / "step-00000012")["step"] == 12


# -- damage


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def flip(name: str, at: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * at)] ^= 1
        (folder / name).write_bytes(content)

    return damage


def change_state(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | changes))

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "byte of the parameters": flip("model.safetensors", 0.9),
    "byte of the header": flip("model.safetensors", 0.01),
    "byte of the optimizer": flip("optimizer.safetensors", 0.5),
    "no parameters": lambda folder: (folder / "model.safetensors").unlink(),
    "no optimizer": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half a state": lambda folder: os.truncate(folder / "state.json", 100),
    "empty state": lambda folder: os.truncate(folder / "state.json", 0),
    "state of another kind": lambda folder: (folder / "state.json").write_text("[]"),
    "state without files": lambda folder: (folder / "state.json").write_text('{"format_version": 1}'),
    "another step": change_state(step=2),
    "newer format": change_state(format_version=99),
    "strange format": change_state(format_version="new"),
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))


@damages
def test_damage_is_noticed(saved: Path, damage: Callable[[Path], object]) -> None:
    verify(saved)
    damage(saved)
    with pytest.raises(DamagedCheckpointError):
        verify(saved)
    with pytest.raises(DamagedCheckpointError):
        SafetensorsIO().load_checkpoint(saved)


@damages
def test_a_damaged_checkpoint_is_passed_over_and_named(
    saved: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    later = saved.with_name("step-00000010")
    SafetensorsIO().save_checkpoint(state(), later)
    assert newest_good(saved.parent) == later
    assert not capsys.readouterr().out
    damage(later)
    assert newest_good(saved.parent) == saved
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("WARNING: passing over a damaged checkpoint: ") and str(later) in warning
    damage(saved)
    assert newest_good(saved.parent) is None


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read whole, by its folder's and its own name; nothing was verified before."""
    counts: Counter[str] = Counter()
    crc32 = checkpoint_folder._crc32

    def counted(file: Path) -> int:
        counts[f"{file.resolve().parent.name}/{file.name}"] += 1
        return crc32(file)

    monkeypatch.setattr(checkpoint_folder, "_verified", {})
    monkeypatch.setattr(checkpoint_folder, "_crc32", counted)
    return counts


def age(folder: Path, seconds: float = 60) -> None:
    """Makes the files look as if they were written so long ago."""
    for file in folder.rglob("*.*"):
        os.utime(file, (time.time(), time.time() - seconds))


def test_a_checkpoint_is_read_once_until_it_changes(saved: Path, read: Counter[str]) -> None:
    age(saved)
    for _ in range(3):
        verify(saved)
    assert read == {f"{saved.name}/{kind}.safetensors": 1 for kind in ("model", "optimizer")}
    DAMAGES["byte of the parameters"](saved)
    with pytest.raises(DamagedCheckpointError):
        verify(saved)


def test_what_was_written_this_moment_is_read_again(saved: Path, read: Counter[str]) -> None:
    """A change right after the check could have the same time."""
    verify(saved)
    verify(saved)
    assert set(read.values()) == {2}


def test_one_rank_reads_for_all_that_see_the_same_files(
    saved: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    age(saved)
    of_first = []

    class Rank(Team):
        def all(self, work: Callable[[], Any]) -> list[Any]:
            answer = work()
            of_first.extend([answer] if self.first else [])
            return [*of_first, answer][: 1 + self.rank]

    assert verified_by_first(Rank(0, 2), lambda: newest_good(saved.parent)) == saved
    monkeypatch.setattr(checkpoint_folder, "_verified", {})  # another process
    assert verified_by_first(Rank(1, 2), lambda: newest_good(saved.parent)) == saved
    verify(saved)
    assert set(read.values()) == {1}
    age(saved, 90)  # that rank sees other files
    verify(saved)
    assert set(read.values()) == {2}


def test_a_start_reads_no_checkpoint_twice_and_of_the_best_only_a_number(
    pretrain: Pretrain, read: Counter[str]
) -> None:
    first = pretrain(max_steps=8, callbacks=[RaiseRateAfter(4)])
    best = (first.checkpoints / "best").readlink().name
    assert best == "step-00000004"
    age(first.checkpoints)
    read.clear()
    pretrain(max_steps=9, callbacks=[RaiseRateAfter(4)])
    assert {name: count for name, count in read.items() if not name.startswith("step-00000009")} == {
        f"step-00000008/{kind}.safetensors": 1 for kind in ("model", "optimizer")
    }
    read.clear()
    pretrain(name="second", init_from=str(first.checkpoints / best), max_steps=2)
    assert read[f"{best}/model.safetensors"] == 1


def test_a_stray_file_is_no_checkpoint(saved: Path) -> None:
    saved.with_name("step-00000099").touch()
    assert newest_good(saved.parent) == saved


def test_a_run_goes_on_before_the_damage_and_writes_over_it(pretrain: Pretrain) -> None:
    run = pretrain(max_steps=8)
    DAMAGES["truncated"](run.checkpoints / "step-00000008")
    pretrain()
    assert names(run) == ["best", "step-00000004", "step-00000008", "step-00000012"]
    assert all(verify(path) for path in run.checkpoints.iterdir())


def test_damaged_checkpoints_do_not_crowd_out_what_is_written_after_them(pretrain: Pretrain) -> None:
    """The run stops at step 6, while a damaged step 8 and 12 are still there."""
    run = pretrain()
    for step in (8, 12):
        DAMAGES["truncated"](run.checkpoints / f"step-{step:08d}")
    with pytest.raises(Killed):
        pretrain(every_n_steps=3, keep_last=1, callbacks=[KillAfter(7)])
    assert newest_good(run.checkpoints) == run.checkpoints / "step-00000006"


def test_a_damaged_best_is_forgotten_with_a_warning(pretrain: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(max_steps=8)
    best = (run.checkpoints / "best").readlink().name
    assert best == "step-00000008"
    DAMAGES["half a state"](run.checkpoints / best)
    pretrain()
    assert "WARNING: the best checkpoint is damaged" in capsys.readouterr().out
    assert verify(run.checkpoints / "best")["val_loss"] > 0


# -- whole or not at all


def test_what_a_killed_attempt_left_half_written_is_removed(pretrain: Pretrain, tmp_path: Path) -> None:
    leftover = tmp_path / "runs" / "run" / "checkpoints" / ".writing-step-00000003"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").touch()
    assert names(pretrain(max_steps=4)) == ["best", "step-00000004"]


def test_a_checkpoint_appears_under_its_name_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step-00000003"
    rename, renamed = Path.rename, []

    def watch(self: Path, target: Path) -> Path:
        assert not path.exists()
        verify(self)
        renamed.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    SafetensorsIO().save_checkpoint(state(), path)
    assert renamed == [".writing-step-00000003"] and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a full disk needs a small file system, and mounting one needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs a small file system: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("size", [150, 250], ids=["optimizer-does-not-fit", "nothing-fits"])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_other(small_disk: Path, size: int) -> None:
    first = small_disk / "step-00000001"
    SafetensorsIO().save_checkpoint(state(size=4), first)
    with pytest.raises(CheckpointNotWrittenError, match=r"step-00000002: .*[Nn]o space left"):
        SafetensorsIO().save_checkpoint(state(size=size), small_disk / "step-00000002")
    assert [path.name for path in small_disk.iterdir()] == [first.name]
    verify(first)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointNotWrittenError, match="Input/output error"):
        SafetensorsIO().save_checkpoint(state(), tmp_path / "step-00000002")
    assert not list(tmp_path.iterdir())


# -- which are kept


def test_the_newest_and_the_best_are_kept(pretrain: Pretrain) -> None:
    """A rate this high makes the loss rise, so the first validation is the best."""
    run = pretrain(lr=1e-2, keep_last=1, val_check_interval=3, every_n_steps=2, callbacks=[RaiseRateAfter(3)])
    assert names(run) == ["best", "step-00000003", "step-00000012"]
    assert (run.checkpoints / "best").readlink() == Path("step-00000003")


class RaiseRateAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step >= self.step:
            for group in optimizer.param_groups:
                group["lr"] = 10.0


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [12]), (2, [10, 12]), (3, [8, 10, 12])])
def test_as_many_of_the_newest_are_kept_as_asked(pretrain: Pretrain, keep_last: int, kept: list[int]) -> None:
    run = pretrain(keep_last=keep_last, keep_best=False, every_n_steps=2)
    assert names(run) == [f"step-{step:08d}" for step in kept]


def test_the_last_step_is_saved_also_when_it_is_not_due(pretrain: Pretrain) -> None:
    assert names(pretrain(max_steps=5, every_n_steps=100, val_samples=0)) == ["step-00000005"]


@pytest.mark.parametrize("killed", [False, True])
def test_the_k_best_are_kept(pretrain: Pretrain, killed: bool) -> None:
    """The losses in metrics.csv say which; the rate is so high that they rise and fall."""
    settings: dict[str, Any] = {
        "lr": 0.2,
        "every_n_steps": 100,
        "keep_last": 1,
        "keep_best": 3,
        "val_check_interval": 1,
    }
    if killed:
        with pytest.raises(Killed):
            pretrain(**settings, callbacks=[KillAfter(6)])
    run = pretrain(**settings)
    losses = sorted((float(loss), int(step)) for step, loss in rows(run, "step", "val_loss") if loss)
    assert [step for _, step in losses] != sorted(step for _, step in losses)
    kept = {f"step-{step:08d}" for _, step in losses[:3]} | {"step-00000012"}
    assert names(run) == sorted({"best", *kept})
    assert (run.checkpoints / "best").readlink() == Path(f"step-{losses[0][1]:08d}")


class Minutes(Callback):
    """A clock that goes on by a minute with each step, on the first rank."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        checkpoint_callback.monotonic = lambda: 60.0 * trainer.global_step * trainer.is_global_zero


def save_by_the_clock(dataset: Path, runs: Path, devices: int) -> None:
    """On the ranks that call this."""
    before = checkpoint_callback.monotonic
    checkpoint_callback.monotonic = lambda: 0.0
    settings: dict[str, Any] = {"every_n_minutes": 3, "every_n_steps": 100, "keep_best": False, "val_check_interval": 4}
    settings |= {"strategy": Parallel()} if devices > 1 else {}
    settings |= {"devices": devices, "global_batch_size": 8}
    try:
        tasks.pretrain(**make_parts(dataset, runs, callbacks=[Minutes()], **settings))
    finally:
        checkpoint_callback.monotonic = before


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_is_saved_when_the_first_rank_s_clock_says_so(dataset: Path, tmp_path: Path, devices: int) -> None:
    """The step after three minutes, with its validation's loss if it has one; the other rank's clock stands still."""
    if devices == 1:
        save_by_the_clock(dataset, tmp_path, 1)
    else:
        on_ranks(2, save_by_the_clock, dataset, tmp_path, 2)
    run = RunDirectory(tmp_path / "run")
    assert names(run) == ["step-00000004", "step-00000008", "step-00000012"]
    assert verify(run.checkpoints / "step-00000004")["val_loss"] > 0


@pytest.mark.parametrize(
    "wrong", [{"keep_best": -1}, {"keep_best": 1.5}, {"every_n_minutes": 0}, {"every_n_minutes": float("nan")}]
)
def test_what_no_checkpoint_can_be_kept_by_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))}="):
        Checkpoint(**wrong)


def test_best_is_known_again_after_a_restart(pretrain: Pretrain) -> None:
    """The rate breaks the model; what is worse than the best of the first attempt does not become the best."""
    pretrain(max_steps=4)
    run = pretrain(max_steps=12, callbacks=[RaiseRateAfter(4)])
    assert (run.checkpoints / "best").readlink() == Path("step-00000004")


def test_the_tokenizer_is_beside_the_checkpoints(pretrain: Pretrain) -> None:
    run = pretrain(max_steps=4)
    assert "".join(Writer.open(run.path).write("fern", 3))


def test_impossible_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Checkpoint(every_n_steps=0, keep_last=-1)
    assert error.value.problems == (
        "every_n_steps=0: must be a whole number of 1 or more",
        "keep_last=-1: must be a whole number of 1 or more",
    )
