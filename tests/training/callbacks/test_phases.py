"""The time of each phase is the time of the work in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from fiddlehead import tasks
from fiddlehead.data.batches import FromGlobalStep
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import LanguageModel
from fiddlehead.training.callbacks import phases as module
from tests.training.conftest import rows

Parts = Callable[..., dict[str, Any]]
Pretrain = Callable[..., RunDirectory]

PAUSES = {"data": 0.04, "forward": 0.06, "backward": 0.08, "optimizer": 0.1}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase takes the seconds of `PAUSES` more, each a different number of them."""

    def paused(name: str, owner: type, method: str) -> None:
        original = getattr(owner, method)

        def patched(*args: Any, **kwargs: Any) -> Any:
            time.sleep(PAUSES[name])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, patched)

    paused("forward", LanguageModel, "training_step")
    paused("backward", LanguageModel, "backward")
    paused("optimizer", LanguageModel, "configure_gradient_clipping")
    batches = FromGlobalStep.__iter__

    def slowly(self: FromGlobalStep) -> Any:
        for batch in batches(self):
            time.sleep(PAUSES["data"])
            yield batch

    monkeypatch.setattr(FromGlobalStep, "__iter__", slowly)


def seconds(run: RunDirectory, step: int) -> dict[str, float]:
    names = [f"seconds_{name}" for name in PAUSES]
    (row,) = [row for row in rows(run, "step", "seconds_per_step", *names) if row[0] == str(step) and row[1]]
    return dict(zip(["step", "total", *PAUSES], map(float, row), strict=True))


def test_each_phase_has_its_own_time(slow: None, pretrain: Pretrain):
    run = pretrain(max_steps=3, val_samples=0)
    found = seconds(run, 3)
    assert all(found[name] >= pause for name, pause in PAUSES.items()), found
    assert sum(found[name] for name in PAUSES) <= found["total"], "nothing is counted twice"


def test_micro_batches_add_up_and_the_window_is_averaged(slow: None, pretrain: Pretrain):
    run = pretrain(max_steps=4, val_samples=0, micro_batch_size=2, log_every_n_steps=2)
    found = seconds(run, 4)
    for name, pause in PAUSES.items():
        assert found[name] >= pause * (1 if name == "optimizer" else 2), found  # two micro-batches, one step
    assert sum(found[name] for name in PAUSES) <= found["total"], "nothing is counted twice"


def test_many_marks_are_read_before_the_line(slow: None, pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    found = seconds(pretrain(max_steps=3, val_samples=0, log_every_n_steps=3), 3)
    assert all(found[name] >= pause for name, pause in PAUSES.items()), found
    assert sum(found[name] for name in PAUSES) <= found["total"]


def test_validation_and_checkpoints_are_no_part_of_a_step(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch):
    saved: list[int] = []

    class Slow(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            time.sleep(2)

    def save(self: Trainer, path: Any) -> None:
        for callback in self.callbacks:  # type: ignore[attr-defined]
            callback.on_save_checkpoint(self, self.lightning_module, {})
        time.sleep(2)
        saved.append(self.global_step)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    run = pretrain(max_steps=6, val_check_interval=2, every_n_steps=3, callbacks=[Slow()])
    assert 3 in saved
    for step in range(2, 7):
        found = seconds(run, step)
        assert found["total"] < 1.8, found


def test_a_checkpoint_says_when_it_begins(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch):
    """The clock stops by a hook of Lightning's, so saving must pass through it."""
    began: list[int] = []
    monkeypatch.setattr(
        module.Phases, "on_save_checkpoint", lambda self, trainer, *_: began.append(trainer.global_step)
    )
    pretrain(max_steps=4, val_samples=0, every_n_steps=2)
    assert began == [2, 4]


def test_the_rate_is_that_of_the_step(parts: Parts):
    run = tasks.pretrain(**parts(max_steps=4, val_samples=0))
    for step, rate, total in rows(run, "step", "tokens_per_s", "seconds_per_step"):
        assert float(rate) == pytest.approx(4 * 16 / float(total)), step


def test_what_is_measured_changes_no_loss(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    with_phases = rows(tasks.pretrain(**parts(name="with")), "loss", "grad_norm")
    for hook in ("on_train_batch_start", "on_before_backward", "on_after_backward"):
        monkeypatch.setattr(module.Phases, hook, lambda self, *_, **__: None)
    assert rows(tasks.pretrain(**parts(name="without")), "loss", "grad_norm") == with_phases


# -- on a GPU


class Device:
    """Stands for a GPU that is `behind` marks behind the host, and takes a second between any two."""

    def __init__(self, behind: int) -> None:
        self.behind = behind
        self.recorded = self.made = self.waited = 0

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        device, self.made = self, self.made + 1

        class Event:
            def record(self) -> None:
                device.recorded += 1
                self.number = device.recorded

            def query(self) -> bool:
                return self.number <= device.recorded - device.behind

            def synchronize(self) -> None:
                device.behind = 0
                device.waited += 1

            def elapsed_time(self, end: Any) -> float:
                assert self.query() and end.query(), "CUDA raises an error"
                return 1000.0 * (end.number - self.number)

        return Event()


def train(phases: module.Phases, steps: int) -> None:
    for _ in range(steps):
        phases.on_train_batch_start(*NOTHING, None, 0)
        phases.on_before_backward(*NOTHING, None)  # type: ignore[arg-type]
        phases.on_after_backward(*NOTHING)
        phases.end_step()
        phases.on_train_batch_end(*NOTHING, None, None, 0)


NOTHING: Any = (None, None)


def test_a_device_that_is_behind_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    device = Device(behind=12)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(module, "MAX_PENDING", 20)
    phases = module.Phases()
    phases._cuda = True
    phases._mark("data")
    train(phases, 50)
    assert device.waited == 0
    assert device.made <= 22, "events that were read are used again"
    window = phases.take()
    assert device.waited == 1
    assert window.steps == ({**dict.fromkeys(module.PHASES, 1.0), "rest": 0.0},) + 49 * (
        dict.fromkeys((*module.PHASES, "rest"), 1.0),
    )
    device.behind = 12
    train(phases, 2)
    phases.pause("checkpoint")
    train(phases, 1)
    *_, last = steps = phases.take().steps
    assert len(steps) == 3
    assert last["data"] == 2, "before the pause and after it, but not in it"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_times_are_those_of_its_kernels():
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    phases = module.Phases()
    phases._cuda = True
    phases._mark("data")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started = time.perf_counter()
    for _ in range(3):
        phases.on_train_batch_start(*NOTHING, None, 0)
        begin.record()
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        end.record()
        phases.on_before_backward(*NOTHING, None)  # type: ignore[arg-type]
        phases.on_after_backward(*NOTHING)
        phases.end_step()
        phases.on_train_batch_end(*NOTHING, None, None, 0)
    assert time.perf_counter() - started < 0.1, "nothing was waited for"
    steps = phases.take().steps
    assert len(steps) == 3
    for step in steps:
        assert step["forward"] == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.05)
        assert step["backward"] < 0.001 and step["data"] < 0.001
