"""Measures the phases of a training step: data, forward, backward, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

PHASES = ("data", "forward", "backward", "optimizer")
"""In the order of a micro-batch; clipping and the schedule belong to the optimizer."""
REST = "rest"
"""The time after a step: logging, looking for the stop file."""
PAUSE = "pause"
"""Validation, checkpoints and profiles, which are not part of a step."""
MAX_PENDING = 1024
"""The most marks to keep before reading those that the device has passed."""


@dataclass(frozen=True)
class Window:
    """The steps between two lines of the log."""

    seconds: float
    """Wall time, without validation, checkpoints and profiles."""
    steps: tuple[dict[str, float], ...]
    """Seconds of each step's phases, and of the `REST` before it."""

    def means(self) -> dict[str, float]:
        """The mean seconds of each phase, by the names of their metrics."""
        return {f"seconds_{phase}": sum(step[phase] for step in self.steps) / len(self.steps) for phase in PHASES}


@dataclass(frozen=True)
class Spent:
    """The time that a number of steps took."""

    steps: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds of all `PHASES`, and of the `REST` between steps."""
    pauses: Mapping[str, float] = field(default_factory=dict)
    """Seconds of validations, checkpoints and profiles."""

    @property
    def seconds_per_step(self) -> float:
        """The mean seconds of a step, without pauses."""
        return sum(self.phases.values()) / self.steps

    def since(self, before: Spent) -> Spent:
        """The time of the steps after `before`."""
        return Spent(
            self.steps - before.steps,
            {name: seconds - before.phases.get(name, 0.0) for name, seconds in self.phases.items()},
            {name: seconds - before.pauses.get(name, 0.0) for name, seconds in self.pauses.items()},
        )


class Phases(Callback):
    """Marks where phases begin. It is the last callback, so the work of other callbacks is not in a phase.

    On a GPU, a mark is a CUDA event; nothing waits for it, and the times are the device's. `data` is then the time in
    which the device waited for a batch. If the host is too slow in a phase, the phase is as long as the host takes. On
    a CPU, a mark is the wall clock.
    """

    def __init__(self) -> None:
        self._cuda = False
        self._marks: list[tuple[str, Any]] = []
        self._unused: list[torch.cuda.Event] = []
        self._step: dict[str, float] = defaultdict(float)
        self._steps: list[dict[str, float]] = []
        self._start = self._paused_at = 0.0
        self._pause, self._pause_began = "", 0.0
        self._done = 0
        self._phases: dict[str, float] = dict.fromkeys((*PHASES, REST), 0.0)
        self._pauses: dict[str, float] = defaultdict(float)

    # -- Lightning's hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._cuda = trainer.strategy.root_device.type == "cuda"
        self._marks, self._paused_at = [], 0.0
        self._start = time.perf_counter()
        self._mark("data")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is on the device."""
        if self._paused_at:
            self._go_on()
        self._mark("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """The loss is computed."""
        self._mark("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are complete, summed over ranks if the backward pass does that."""
        self._mark("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The other callbacks have run."""
        self._go_on()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self.pause("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restarts the clock."""
        self._go_on()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stops the clock."""
        self.pause("checkpoint")

    # -- for other callbacks

    def end_step(self) -> None:
        """Ends the step; the work of callbacks after it begins."""
        self._mark(REST)

    def pause(self, what: str) -> None:
        """Stops the clock until the other callbacks have run.

        Args:
            what: the pause that begins: "validation", "checkpoint" or "profile".
        """
        now = time.perf_counter()
        if self._paused_at:
            self._pauses[self._pause] += now - self._pause_began
        else:
            self._paused_at = now
            self._mark(PAUSE)
        self._pause, self._pause_began = what, now

    def so_far(self) -> Spent:
        """The time of this attempt's steps so far; waits for the device."""
        self._read(wait=True)
        return Spent(self._done, dict(self._phases), dict(self._pauses))

    def take(self) -> Window:
        """The steps since the last call, at least one; waits for the device."""
        self._read(wait=True)
        now = time.perf_counter()
        window = Window(now - self._start, tuple(self._steps))
        self._start, self._steps = now, []
        return window

    # -- inside

    def _go_on(self) -> None:
        if self._paused_at:
            self._read(wait=True)
            self._marks.clear()
            now = time.perf_counter()
            self._pauses[self._pause] += now - self._pause_began
            self._start += now - self._paused_at
            self._paused_at = 0.0
        self._mark("data")

    def _mark(self, phase: str) -> None:
        """Ends a phase, and begins `phase`."""
        if self._cuda:
            mark = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((phase, mark))
        if len(self._marks) > MAX_PENDING:
            self._read(wait=False)

    def _read(self, *, wait: bool) -> None:
        """Adds up the phases between marks; the mark that ends the last of them is where the next one begins."""
        count = len(self._marks)
        if self._cuda and count:
            if wait:
                self._marks[-1][1].synchronize()
            count = next((i for i, (_, event) in enumerate(self._marks) if not event.query()), count)
        for (phase, start), (following, end) in pairwise(self._marks[:count]):
            self._step[phase] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
            if following == REST:
                self._steps.append(dict.fromkeys((*PHASES, REST), 0.0) | self._step)
                self._done += 1
                for name in self._phases:
                    self._phases[name] += self._steps[-1][name]
                self._step.clear()
        done = max(0, count - 1)
        if self._cuda:
            self._unused += [event for _, event in self._marks[:done]]
        del self._marks[:done]


def exposed_communication(trainer: Trainer) -> float | None:
    """How many seconds longer than the backward computation the exchange of gradients took, in one step.

    `DistributedDataParallel` measures it in its first ten steps and in every hundredth; it is a part of `backward`.
    None if it is not measured: with one process, or with another strategy, where a profile shows it.
    """
    model: Any = trainer.strategy.model
    if trainer.world_size == 1 or not isinstance(model, DistributedDataParallel):
        return None
    measured = model._get_ddp_logging_data()
    if not measured.get("backward_comm_time"):
        return None
    hidden = measured.get("backward_compute_comm_overlap_time", 0)
    return max(0, int(measured["backward_comm_time"]) - int(hidden)) / 1e9
