"""The base of all optimizers: plain settings that build PyTorch's optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fiddlehead.errors import Problem, refuse
from fiddlehead.models.parallel import Layout
from fiddlehead.numbers import is_number
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.optim.schedules import CosineAnnealing, Schedule

FusedRows = Mapping[str, tuple[int, ...]]
"""For each parameter that fuses several matrices, by name: the rows of each matrix."""
NOT_FUSED: FusedRows = {}


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The settings of all optimizers. Weight decay applies only to matrices, not to gains, biases and other vectors."""

    takes_whole_matrices: ClassVar[bool] = False
    """Whether each rank's step takes whole matrices, and not only the rank's shards."""

    lr: float = 3e-4
    """The peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The decay rates of the two moments."""
    eps: float = 1e-8
    """What is added to the root of the second moment."""
    weight_decay: float = 0.1
    """The decoupled weight decay, as a multiple of the learning rate."""
    lr_scheduler: Schedule = field(default_factory=CosineAnnealing)
    """How the learning rate changes over the run."""

    def __post_init__(self) -> None:
        refuse(self._refused())

    @property
    def kind(self) -> str:
        """The result of `kind_of` for the optimizers that this builds."""
        return type(self).__name__

    @property
    def takes_bfloat16_gradients(self) -> bool:
        """Whether the optimizer, with the same attribute, takes bfloat16 gradients of float32 parameters."""
        return False

    def build(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        max_steps: int,
        fused: FusedRows = NOT_FUSED,
        layout: Layout | None = None,
    ) -> dict[str, Any]:
        """The optimizer and its schedule, in Lightning's form; the arguments are those of `optimizer` and `share`."""
        trained = [(name, p) for name, p in named_parameters if p.requires_grad]
        optimizer = self.optimizer(trained, fused)
        if layout is not None:
            self.share(optimizer, trained, layout)
        optimizer.param_groups[0]["kind"] = self.kind  # a checkpoint has the groups
        schedule = LambdaLR(optimizer, lambda step: self.lr_scheduler(step, max_steps, self.lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> torch.optim.Optimizer:
        """Builds the optimizer; its first group has the rate `lr`.

        Args:
            fused: the rows of each matrix in parameters that fuse several, by name.
        """
        raise NotImplementedError

    def share(
        self, optimizer: torch.optim.Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], layout: Layout
    ) -> None:
        """Tells an optimizer which parts of the parameters this rank has; most do not depend on it."""

    def problems(self, precision: str, split: Sizes | None, *, adapters: bool) -> list[Problem]:
        """The reasons why a run cannot use this optimizer.

        Args:
            precision: Lightning's precision.
            split: the ranks over which the parameters are sharded; None if they are not.
            adapters: whether only adapters are trained.
        """
        return []

    def compiles(self, device: torch.device) -> bool:
        """Whether kernels of its step are compiled on this device."""
        return False

    def state_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """The bytes of its state for these parameters."""
        raise NotImplementedError

    def step_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """The bytes that its step needs besides its state, and frees."""
        return 0

    def step_work(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[float, float]:
        """What its step does besides reading and writing parameters, gradients and state: operations, and bytes."""
        return 0.0, 0.0

    def _refused(self) -> list[Problem]:
        """The impossible values."""
        problems = []
        if not (is_number(self.weight_decay) and self.weight_decay >= 0):
            problems.append(Problem("weight_decay", self.weight_decay, "must be a finite number of 0 or more"))
        if not (is_number(self.lr) and self.lr > 0):
            problems.append(Problem("lr", self.lr, "must be a finite number above 0"))
        if not (is_number(self.eps) and self.eps > 0):
            problems.append(Problem("eps", self.eps, "must be a finite number above 0"))
        if not (len(self.betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)):
            problems.append(Problem("betas", self.betas, "must be two numbers, each at least 0 and below 1"))
        lacks = [name for name in ("warmup_steps", "min_lr") if not hasattr(self.lr_scheduler, name)]
        if lacks or not callable(self.lr_scheduler):
            message = f"lacks {', '.join(lacks)}" if lacks else "cannot be called"
            message += "; fiddlehead.training.optim:Schedule says what a schedule has"
            problems.append(Problem("lr_scheduler", type(self.lr_scheduler).__qualname__, message))
        elif is_number(self.lr) and self.lr > 0 and self.lr_scheduler.min_lr > self.lr:
            problems.append(Problem("lr_scheduler.min_lr", self.lr_scheduler.min_lr, f"is above lr={self.lr!r}"))
        return problems

    def numbered(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> list[dict[str, Any]]:
        """The groups of the optimizer that `optimizer` builds; checkpoints number the parameters in this order."""
        return self.groups(parameter for _, parameter in named_parameters)

    def groups(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """Parameters in two groups: with weight decay, and without."""
        parameters = list(parameters)
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Calls the closure of an optimizer's step, with gradients, and returns its loss; None if there is no closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
