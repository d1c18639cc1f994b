"""What every optimizer is: a plain value that builds what PyTorch needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fiddlehead.errors import ConfigError
from fiddlehead.numbers import is_number
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.optim.schedules import CosineAnnealing, Schedule

FusedRows = Mapping[str, tuple[int, ...]]
"""How many rows belong to each of the matrices that a parameter of this name is several in one of."""
NOT_FUSED: FusedRows = {}


@dataclass(frozen=True, kw_only=True)
class Optim:
    """What optimizers have in common; weight decay applies to matrices and not to gains, biases and other vectors."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    lr_scheduler: Schedule = field(default_factory=CosineAnnealing)

    def __post_init__(self) -> None:
        if problems := self._refused():
            raise ConfigError(*problems)

    @property
    def kind(self) -> str:
        """What `kind_of` says of the optimizers that it makes."""
        return type(self).__name__

    def build(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], max_steps: int, fused: FusedRows = NOT_FUSED
    ) -> dict[str, Any]:
        """The optimizer and its schedule, in Lightning's form; the arguments are those of `optimizer`."""
        optimizer = self.optimizer([(name, p) for name, p in named_parameters if p.requires_grad], fused)
        optimizer.param_groups[0]["kind"] = self.kind  # a checkpoint has the groups
        schedule = LambdaLR(optimizer, lambda step: self.lr_scheduler(step, max_steps, self.lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> torch.optim.Optimizer:
        """The optimizer, whose first group has the rate `lr`.

        Args:
            fused: for parameters that are several matrices in one: how many rows belong to each, by their names.
        """
        raise NotImplementedError

    def problems(self, precision: str, split: Sizes | None, *, adapters: bool) -> list[str]:
        """Why a run cannot train with it; empty if it can.

        Args:
            precision: Lightning's.
            split: over how many ranks the parameters are cut, if they are.
            adapters: whether these are all that is trained.
        """
        return []

    def compiles(self, precision: str) -> bool:
        """Whether its step is compiled."""
        return False

    def state_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """How much memory what it keeps for these parameters takes."""
        raise NotImplementedError

    def _refused(self) -> list[str]:
        problems = []
        if not (is_number(self.weight_decay) and self.weight_decay >= 0):
            problems.append(f"weight_decay={self.weight_decay!r}: must not be negative, and finite")
        if not (is_number(self.lr) and self.lr > 0):
            problems.append(f"lr={self.lr!r}: must be above 0 and finite")
        if not (is_number(self.eps) and self.eps > 0):
            problems.append(f"eps={self.eps!r}: must be above 0 and finite")
        if not (len(self.betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)):
            problems.append(f"betas={self.betas!r}: must be two numbers, each at least 0 and below 1")
        if is_number(self.lr) and self.lr > 0 and self.lr_scheduler.min_lr > self.lr:
            problems.append(f"lr_scheduler.min_lr={self.lr_scheduler.min_lr!r}: is above lr={self.lr!r}")
        return problems

    def groups(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """The parameters as the optimizer groups them, and numbers them: one group after another."""
        parameters = list(parameters)
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
