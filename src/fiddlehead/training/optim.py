"""Optimizers and learning-rate schedules, as plain values that build what PyTorch needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fiddlehead.errors import ConfigError
from fiddlehead.training.bfloat16_adamw import BFloat16AdamW


class Schedule(Protocol):
    """The learning rate over a run, as a factor of its peak."""

    @property
    def warmup_steps(self) -> int:
        """How many steps the rate rises."""
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
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _refuse_negative(warmup_steps=self.warmup_steps, min_lr=self.min_lr)

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

    The decay takes the last `decay_fraction` of the run, so that a shorter run still ends in one.
    """

    warmup_steps: int = 0
    decay_fraction: float = 0.2
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _refuse_negative(warmup_steps=self.warmup_steps, min_lr=self.min_lr)
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction={self.decay_fraction!r}: must be from 0 to 1")

    def __call__(self, step: int, max_steps: int, lr: float) -> float:
        """The factor on `lr` for the step after `step` finished ones."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * max_steps
        floor = self.min_lr / lr
        falling = floor + (1 - floor) * max(0, max_steps - step) / decay_steps if decay_steps else 1.0
        return min(rising, falling)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay applies to matrices and not to gains, biases and other vectors."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    lr_scheduler: Schedule = field(default_factory=CosineAnnealing)

    def __post_init__(self) -> None:
        problems = []
        if self.weight_decay < 0:
            problems.append(f"weight_decay={self.weight_decay!r}: must not be negative")
        if not 0 < self.lr < math.inf:
            problems.append(f"lr={self.lr!r}: must be above 0 and finite")
        if not self.eps > 0:
            problems.append(f"eps={self.eps!r}: must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas={self.betas!r}: each must be at least 0 and below 1")
        if self.lr > 0 and self.lr_scheduler.min_lr > self.lr:
            problems.append(f"lr_scheduler.min_lr={self.lr_scheduler.min_lr!r}: is above lr={self.lr!r}")
        if problems:
            raise ConfigError(*problems)

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]], max_steps: int):
        """The optimizer and its schedule, in Lightning's form."""
        optimizer = self.optimizer([(name, p) for name, p in named_parameters if p.requires_grad])
        schedule = LambdaLR(optimizer, lambda step: self.lr_scheduler(step, max_steps, self.lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer(self, named_parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimizer: PyTorch's, in one launch, or for bfloat16 parameters one that keeps float32 weights."""
        parameters = [parameter for _, parameter in named_parameters]
        groups = self.groups(parameters)
        if parameters and all(parameter.dtype == torch.bfloat16 for parameter in parameters):
            return BFloat16AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def groups(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """The parameters as the optimizer groups them, and numbers them: one group after another."""
        parameters = list(parameters)
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]


def _refuse_negative(**values: float) -> None:
    problems = [f"{name}={value!r}: must not be negative" for name, value in values.items() if value < 0]
    if problems:
        raise ConfigError(*problems)
