"""The garbage collector runs only at chosen steps during training, and as usual afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from fiddlehead.run.directory import RunDirectory
from fiddlehead.training.callbacks import garbage
from tests.training.conftest import KillAfter, Killed

Pretrain = Callable[..., RunDirectory]


class Cycles(Callback):
    """Makes much garbage in each step, and notes in which steps the collector ran, and of which generation."""

    def __init__(self) -> None:
        self.step = 0
        self.runs: list[tuple[int, int]] = []
        self.left: list[weakref.ref[Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step + 1
        for _ in range(2000):  # more than the collector's threshold
            cycle = Cycle()
            cycle.itself = cycle
        self.left.append(weakref.ref(cycle))

    def note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and self.step:
            self.runs.append((self.step, info["generation"]))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.step = 0


class Cycle:
    itself: Any


@pytest.fixture
def cycles(collector: None) -> Iterator[Cycles]:
    made, before = Cycles(), gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's own, of which the command makes another
    gc.callbacks.append(made.note)
    yield made
    gc.callbacks.remove(made.note)
    gc.set_threshold(*before)


def test_it_collects_at_its_steps_and_after_validation_and_at_no_other_time(
    cycles: Cycles, pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage.CollectGarbage.__init__, "__defaults__", (3,))
    pretrain(callbacks=[cycles], max_steps=10, val_check_interval=5)
    assert cycles.runs == [(3, 1), (5, 2), (6, 1), (9, 1), (10, 2)]
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert not any(reference() for reference in cycles.left)


def test_accumulated_micro_batches_are_one_step(
    cycles: Cycles, pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage.CollectGarbage.__init__, "__defaults__", (2,))
    pretrain(callbacks=[cycles], max_steps=4, val_samples=0, micro_batch_size=2)
    assert cycles.runs == [(2, 1), (4, 1)]


def test_without_it_the_collector_runs_in_the_middle_of_steps(
    cycles: Cycles, pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would say nothing."""
    monkeypatch.setattr("fiddlehead.training.fit.CollectGarbage", Callback)
    pretrain(callbacks=[cycles], max_steps=4, val_samples=0)
    assert {step for step, _ in cycles.runs} == {1, 2, 3, 4}


def test_a_run_that_fails_leaves_the_collector_as_it_was(cycles: Cycles, pretrain: Pretrain) -> None:
    with pytest.raises(Killed):
        pretrain(callbacks=[cycles, KillAfter(2)])
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_program_that_switched_the_collector_off_keeps_it_off(cycles: Cycles, pretrain: Pretrain) -> None:
    gc.disable()
    try:
        pretrain(callbacks=[cycles], max_steps=4)
        assert not cycles.runs and not gc.isenabled()
    finally:
        gc.enable()
