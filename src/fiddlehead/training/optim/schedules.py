"""Learning-rate schedules: the rate over a run, as a factor of its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from fiddlehead.errors import Problem, refuse
from fiddlehead.numbers import is_number, is_whole


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


def _schedule_problems(schedule: Schedule) -> list[Problem]:
    problems = []
    if not (is_whole(schedule.warmup_steps) and schedule.warmup_steps >= 0):
        problems.append(Problem("warmup_steps", schedule.warmup_steps, "must be a whole number of 0 or more"))
    if not (is_number(schedule.min_lr) and schedule.min_lr >= 0):
        problems.append(Problem("min_lr", schedule.min_lr, "must be a finite number of 0 or more"))
    return problems
