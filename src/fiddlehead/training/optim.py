"""Optimizers and learning-rate schedules, as plain values that build what PyTorch needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fiddlehead.errors import ConfigError
from fiddlehead.numbers import is_number, is_whole
from fiddlehead.training.bfloat16_adamw import BFloat16AdamW
from fiddlehead.training.muon import MuonWithAdamW

if TYPE_CHECKING:
    from fiddlehead.training.parallel import Parallel

FusedRows = Mapping[str, tuple[int, ...]]
"""How many rows belong to each of the matrices that a parameter of this name is several in one of."""
NOT_FUSED: FusedRows = {}


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
        _refuse(_schedule_problems(self))

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
        problems = _schedule_problems(self)
        if not (is_number(self.decay_fraction) and 0 <= self.decay_fraction <= 1):
            problems.append(f"decay_fraction={self.decay_fraction!r}: must be from 0 to 1")
        _refuse(problems)

    def __call__(self, step: int, max_steps: int, lr: float) -> float:
        """The factor on `lr` for the step after `step` finished ones."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * max_steps
        floor = self.min_lr / lr
        falling = floor + (1 - floor) * max(0, max_steps - step) / decay_steps if decay_steps else 1.0
        return min(rising, falling)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """What optimizers have in common; weight decay applies to matrices and not to gains, biases and other vectors."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    lr_scheduler: Schedule = field(default_factory=CosineAnnealing)

    def __post_init__(self) -> None:
        _refuse(self._refused())

    @property
    def kind(self) -> str:
        """What `kind_of` says of the optimizers that it makes."""
        return type(self).__name__

    def build(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], max_steps: int, fused: FusedRows = NOT_FUSED
    ) -> dict[str, Any]:
        """The optimizer and its schedule, in Lightning's form; the arguments are those of `optimizer`."""
        optimizer = self.optimizer([(name, p) for name, p in named_parameters if p.requires_grad], fused)
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

    def problems(self, precision: str, strategy: Parallel | None, *, adapters: bool) -> list[str]:
        """Why a run cannot train with it; empty if it can.

        Args:
            precision: Lightning's.
            strategy: what cuts the parameters over several ranks, if anything does.
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


@dataclass(frozen=True, kw_only=True)
class AdamW(Optim):
    """AdamW (Loshchilov & Hutter 2019); weight decay applies to matrices and not to gains, biases and other vectors.

    Args:
        state_bits: of each of the two moments. With 8 (Dettmers et al. 2022) they take a quarter of the memory, the
            losses are a little different, and torchao does it, which compiles the step.
    """

    state_bits: Literal[8, 32] = 32

    @property
    def kind(self) -> str:
        """What `kind_of` says of the optimizers that it makes."""
        return "AdamW" if self.state_bits == 32 else f"AdamW(state_bits={self.state_bits})"

    def optimizer(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> torch.optim.Optimizer:
        """PyTorch's, in one launch; for bfloat16 parameters one that keeps float32 weights; torchao's for 8 bits.

        Raises:
            ConfigError: torchao is not installed.
        """
        parameters = [parameter for _, parameter in named_parameters]
        groups = self.groups(parameters)
        settings: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        if self.state_bits == 8:
            try:
                from fiddlehead.training.adamw_8bit import SavedAdamW8bit
            except ImportError as error:
                message = f"optim.state_bits=8 needs torchao: pip install 'fiddlehead[torchao]' ({error})"
                raise ConfigError(message) from error
            return SavedAdamW8bit(groups, **settings)
        if parameters and all(parameter.dtype == torch.bfloat16 for parameter in parameters):
            return BFloat16AdamW(groups, **settings)
        return torch.optim.AdamW(groups, **settings, fused=True)

    def problems(self, precision: str, strategy: Parallel | None, *, adapters: bool) -> list[str]:
        """8-bit moments are those of whole float32 parameters."""
        problems = []
        if self.state_bits == 8 and precision == "bf16-true":
            problems.append(
                "optim.state_bits=8: trainer.precision='bf16-true' would round small steps away; allowed: "
                "'bf16-mixed', '32-true', or optim.state_bits=32, which keeps what is rounded"
            )
        if self.state_bits == 8 and strategy is not None:
            problems.append(
                "optim.state_bits=8: the scales of 8-bit moments cannot be cut over several devices yet; allowed: 32, "
                "or one device, or trainer.strategy=ddp"
            )
        return problems

    def compiles(self, precision: str) -> bool:
        """Whether its step is compiled: where it is more than PyTorch's own."""
        return self.state_bits == 8 or precision == "bf16-true"

    def state_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """Two moments; with bfloat16 parameters also the other half of each weight."""
        sizes = [parameter.numel() for _, parameter in named_parameters]
        if self.state_bits == 8:
            return sum(_moments_bytes(size) for size in sizes)
        return (10 if precision == "bf16-true" else 8) * sum(sizes)

    def _refused(self) -> list[str]:
        problems = super()._refused()
        if self.state_bits not in (8, 32):
            problems.append(f"state_bits={self.state_bits!r}: allowed: 8, 32")
        return problems


@dataclass(frozen=True, kw_only=True)
class Muon(Optim):
    """Muon (Jordan et al. 2024) for the matrices inside the layers; AdamW for embeddings, output layer and vectors.

    Muon's updates have the size of AdamW's (Liu et al. 2025), so that a rate that is good for one is worth a try with
    the other. The query, key and value parts of an attention layer's one projection are matrices of their own to it, as
    are the gate and the other half of a feed-forward layer's first, and those of each expert.

    Args:
        momentum: of Muon, with Nesterov's look ahead; `betas` and `eps` are AdamW's.
        adamw_lr: the peak rate of what AdamW trains; None is `lr`. The schedule is a factor on both.
    """

    momentum: float = 0.95
    adamw_lr: float | None = None

    def optimizer(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> torch.optim.Optimizer:
        """One optimizer for both; matrices of one kind are a group."""
        by_rows: dict[tuple[int, ...] | None, list[nn.Parameter]] = {None: []}
        for name, parameter in named_parameters:
            if _is_inner_matrix(name, parameter):
                by_rows.setdefault(fused.get(name), []).append(parameter)
        muon = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        rest = self.groups(p for name, p in named_parameters if not _is_inner_matrix(name, p))
        adamw = {"lr": self.adamw_lr or self.lr, "betas": self.betas, "eps": self.eps, "fused": True}
        return MuonWithAdamW(
            [{"params": params, "rows": rows, **muon} for rows, params in by_rows.items()]
            + [group | adamw for group in rest]
        )

    def problems(self, precision: str, strategy: Parallel | None, *, adapters: bool) -> list[str]:
        """Muon takes float32 parameters, and whole matrices that are not the factors of others."""
        problems = []
        if precision == "bf16-true":
            problems.append(
                "optim=Muon: trainer.precision='bf16-true' would round small steps away; allowed: 'bf16-mixed', "
                "'32-true', or optim=AdamW, which keeps what is rounded"
            )
        if strategy is not None and strategy.tensor_parallel > 1:
            problems.append(
                f"optim=Muon: trainer.strategy.tensor_parallel={strategy.tensor_parallel} reorders the rows of its "
                "matrices; allowed: 1, or optim=AdamW"
            )
        if strategy is not None and strategy.pipeline_parallel > 1:
            problems.append(
                f"optim=Muon: trainer.strategy.pipeline_parallel={strategy.pipeline_parallel} numbers the parameters "
                "of a checkpoint as AdamW has them; allowed: 1, or optim=AdamW"
            )
        if adapters:
            problems.append(
                "optim=Muon: adapters are factors of a change, and to make each factor orthogonal is not to make the "
                "change so; set optim=AdamW, or model.lora=None"
            )
        return problems

    def state_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """One moment of what Muon trains, two of the rest."""
        return sum((4 if _is_inner_matrix(name, p) else 8) * p.numel() for name, p in named_parameters)

    def _refused(self) -> list[str]:
        problems = super()._refused()
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            problems.append(f"momentum={self.momentum!r}: must be at least 0 and below 1")
        if self.adamw_lr is not None and not (is_number(self.adamw_lr) and self.adamw_lr > 0):
            problems.append(f"adamw_lr={self.adamw_lr!r}: must be above 0 and finite, or None")
        return problems


def kind_of(groups: Sequence[Mapping[str, Any]]) -> str:
    """Which optimizer the groups in a checkpoint are of."""
    if "momentum" in groups[0]:
        return "Muon"
    return AdamW(state_bits=groups[0].get("state_bits", 32)).kind


def _moments_bytes(size: int) -> int:
    """What torchao keeps for a parameter of so many weights: codes, scales and the table of what they mean, twice."""
    quantized = size >= 4096 and size % 256 == 0
    return 2 * (size + 4 * size // 256 + 4 * 256) if quantized else 8 * size


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or one for each expert, of a layer; an expert's biases are not."""
    return "layers" in name.split(".") and name.endswith(".weight") and parameter.dim() >= 2


def _schedule_problems(schedule: Schedule) -> list[str]:
    problems = []
    if not (is_whole(schedule.warmup_steps) and schedule.warmup_steps >= 0):
        problems.append(f"warmup_steps={schedule.warmup_steps!r}: must not be negative, and a whole number")
    if not (is_number(schedule.min_lr) and schedule.min_lr >= 0):
        problems.append(f"min_lr={schedule.min_lr!r}: must not be negative, and finite")
    return problems


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(*problems)
