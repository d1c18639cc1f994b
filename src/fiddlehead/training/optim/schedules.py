"""Learning-rate schedules: the rate over a run, as a factor of its peak."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

from fiddlehead.errors import Problem, refuse
from fiddlehead.numbers import is_number, is_whole, rate


class Schedule(Protocol):
    """The learning rate over a run, as a factor of its peak."""

    @property
    def warmup_steps(self) -> int:
        """The number of steps in which the rate rises."""
        ...

    @property
    def min_lr(self) -> float:
        """The rate at the end."""
        ...

    def __call__(self, step: int, max_steps: int, lr: float) -> float:
        """The factor on `lr` for the step after `step` finished ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class CosineAnnealing:
    """Linear warm-up, then half a cosine down towards `min_lr` at the end (Loshchilov & Hutter 2017)."""

    warmup_steps: int = 0
    """Steps in which the rate rises from 0 to its peak."""
    min_lr: float = 0.0
    """The rate at the end."""

    def __post_init__(self) -> None:
        refuse(_schedule_problems(self))

    def __call__(self, step: int, max_steps: int, lr: float) -> float:
        """The factor on `lr` for the step after `step` finished ones."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        floor = self.min_lr / lr
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def course(self, max_steps: int, lr: float) -> str:
        """The rate over the run in one line."""
        if self.warmup_steps >= max_steps:
            return _all_warm_up(self, max_steps, lr)
        falls = f"cosine to {rate(self.min_lr)} at {max_steps:,}" if self.min_lr < lr else "constant"
        return f"{_rise(self.warmup_steps, lr)}, {falls}"


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, a constant rate, then a linear decay to `min_lr` (Hu et al. 2024).

    The decay takes the last `decay_fraction` of the run, so that a shorter run decays too.
    """

    warmup_steps: int = 0
    """Steps in which the rate rises from 0 to its peak."""
    decay_fraction: float = 0.2
    min_lr: float = 0.0
    """The rate at the end."""

    def __post_init__(self) -> None:
        problems = _schedule_problems(self)
        if not (is_number(self.decay_fraction) and 0 <= self.decay_fraction <= 1):
            problems.append(Problem("decay_fraction", self.decay_fraction, "must be from 0 to 1"))
        refuse(problems)

    def __call__(self, step: int, max_steps: int, lr: float) -> float:
        """The factor on `lr` for the step after `step` finished ones."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * max_steps
        floor = self.min_lr / lr
        falling = floor + (1 - floor) * max(0, max_steps - step) / decay_steps if decay_steps else 1.0
        return min(rising, falling)

    def course(self, max_steps: int, lr: float) -> str:
        """The rate over the run in one line."""
        start = round((1 - self.decay_fraction) * max_steps)
        falls = f"linear to {rate(self.min_lr)} at {max_steps:,}"
        if self.min_lr == lr or start >= max_steps:
            if self.warmup_steps >= max_steps:
                return _all_warm_up(self, max_steps, lr)
            return f"{_rise(self.warmup_steps, lr)}, constant"
        if self.warmup_steps > start:  # the decay begins before the warm-up ends

            def falling(step: int) -> bool:
                return self(step + 1, max_steps, lr) <= self(step, max_steps, lr)

            top = bisect.bisect_left(range(max_steps), True, key=falling)
            if top >= max_steps - 1:
                return _all_warm_up(self, max_steps, lr)
            reached = rate(lr * self(top, max_steps, lr))
            return f"0 to {reached} in {top + 1:,} steps, where the warm-up to {rate(lr)} meets the decay, {falls}"
        stays = f"constant until {start:,}, " if start > self.warmup_steps else ""
        return f"{_rise(self.warmup_steps, lr)}, {stays}{falls}"


def course(schedule: Schedule, max_steps: int, lr: float) -> str:
    """The learning rate over a run in one line: "0 to 3e-4 in 2,000 steps, cosine to 3e-5 at 300,000".

    A schedule without a method `course` is described by rates at some of its steps.
    """
    own = getattr(schedule, "course", None)
    if own is not None:
        return own(max_steps, lr)
    every = max(1, max_steps // 1000)
    steps = sorted({*range(0, max_steps, every), min(max(0, schedule.warmup_steps - 1), max_steps - 1), max_steps - 1})
    try:
        rates = {step + 1: lr * schedule(step, max_steps, lr) for step in steps}
    except Exception as error:  # the user's code; the run itself says where it fails
        return f"{type(schedule).__name__}: not known, as it raises {type(error).__name__}: {error}"
    top = max(rates, key=rates.__getitem__)
    points = dict.fromkeys((1, top, max_steps))
    said = (f"{rate(rates[step])} at {step:,}" for step in points)
    return f"{type(schedule).__name__}: {', '.join(said)}"


def _rise(warmup_steps: int, lr: float) -> str:
    return f"0 to {rate(lr)} in {warmup_steps:,} steps" if warmup_steps else rate(lr)


def _all_warm_up(schedule: Schedule, max_steps: int, lr: float) -> str:
    """The course of a run that is not longer than its warm-up."""
    reached = rate(lr * schedule(max_steps - 1, max_steps, lr))
    if schedule.warmup_steps == max_steps:
        return f"0 to {reached} in {max_steps:,} steps"
    return f"0 to {reached} in {max_steps:,} steps; the warm-up to {rate(lr)} takes {schedule.warmup_steps:,}"


def _schedule_problems(schedule: Schedule) -> list[Problem]:
    problems = []
    if not (is_whole(schedule.warmup_steps) and schedule.warmup_steps >= 0):
        problems.append(Problem("warmup_steps", schedule.warmup_steps, "must be a whole number of 0 or more"))
    if not (is_number(schedule.min_lr) and schedule.min_lr >= 0):
        problems.append(Problem("min_lr", schedule.min_lr, "must be a finite number of 0 or more"))
    return problems
