"""Muon for the matrices of a model's layers and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from fiddlehead.errors import Problem
from fiddlehead.models.parallel import Layout, fsdp_slices, local, splits_over
from fiddlehead.numbers import is_number
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.optim.optim import NOT_FUSED, FusedRows, Optim, loss_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The polynomial's coefficients: they move all singular values to between 0.7 and 1.2 in few steps, not to 1 in
many."""
STEPS = 5
"""How many times the polynomial is applied."""
RMS = 0.2
"""The root mean square of an update of AdamW, about, which Muon's is scaled to."""


@dataclass(frozen=True, kw_only=True)
class Muon(Optim):
    """Muon (Jordan et al. 2024) for the matrices inside the layers; AdamW for embeddings, output layer and vectors.

    Muon's updates have the size of AdamW's (Liu et al. 2025), so a good rate for one is a good first guess for the
    other. In fused layers, the query, key and value projections are separate matrices for Muon, and so are the gate and
    up projections; the matrices of each expert are separate too.

    Args:
        momentum: the momentum of Muon (Nesterov); `betas` and `eps` are for AdamW.
        adamw_lr: the peak rate of the parameters that AdamW trains; None means `lr`. The schedule is a factor on both.
    """

    takes_whole_matrices: ClassVar[bool] = True

    momentum: float = 0.95
    adamw_lr: float | None = None

    def optimizer(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> torch.optim.Optimizer:
        """One optimizer for Muon and AdamW; each kind of matrix is a group."""
        return MuonWithAdamW(self.numbered(named_parameters, fused))

    def numbered(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> list[dict[str, Any]]:
        """As `Optim.numbered`."""
        by_rows: dict[tuple[int, ...] | None, list[nn.Parameter]] = {None: []}
        for name, parameter in named_parameters:
            if _is_inner_matrix(name, parameter):
                by_rows.setdefault(fused.get(name), []).append(parameter)
        muon = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        rest = self.groups(p for name, p in named_parameters if not _is_inner_matrix(name, p))
        adamw = {"lr": self.adamw_lr or self.lr, "betas": self.betas, "eps": self.eps, "fused": True}
        groups = [{"params": params, "rows": rows, **muon} for rows, params in by_rows.items()]
        return groups + [group | adamw for group in rest]

    def share(
        self, optimizer: torch.optim.Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], layout: Layout
    ) -> None:
        """As `Optim.share`: Muon needs whole matrices."""
        assert isinstance(optimizer, MuonWithAdamW)
        split = {name for name, _ in named_parameters if splits_over(name, layout.config) == "tp"}
        optimizer.layout, optimizer.split = layout, {p: name for name, p in named_parameters if name in split}

    def problems(self, precision: str, split: Sizes | None, *, adapters: bool) -> list[Problem]:
        """Muon needs float32 parameters, and cannot train adapters."""
        reasons = []
        if precision == "bf16-true":
            reasons.append(
                "trainer.precision='bf16-true' would round small steps away; set 'bf16-mixed' or '32-true', or "
                "optim=AdamW, which keeps what is rounded"
            )
        if adapters:
            reasons.append(
                "adapters are factors of a change; making each factor orthogonal does not make the change orthogonal; "
                "set optim=AdamW, or model.lora=None"
            )
        return [Problem("optim", "Muon", reason) for reason in reasons]

    def state_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """One moment for Muon's parameters, two for the others."""
        return sum((4 if _is_inner_matrix(name, p) else 8) * p.numel() for name, p in named_parameters)

    def step_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """Of one matrix: the direction in float32, and in bfloat16 what is orthogonal, its product and the result."""
        sizes = (parameter.numel() for name, parameter in named_parameters if _is_inner_matrix(name, parameter))
        return 10 * max(sizes, default=0)

    def step_work(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[float, float]:
        """The products that make the matrices orthogonal, and the bytes of what is between them.

        Fused matrices are counted as one, which has nearly the same products.
        """
        operations = moved = 0.0
        for name, parameter in named_parameters:
            if _is_inner_matrix(name, parameter):
                m, n = sorted(parameter.shape[-2:])
                operations += parameter.numel() / (m * n) * STEPS * (4 * m * m * n + 2 * m**3)
                # Nesterov's direction 16, bfloat16 6, the norm 6, each step 10, the scale 8, the weights' decay 8.
                moved += (44 + 10 * STEPS) * parameter.numel()
        return operations, moved

    def _refused(self) -> list[Problem]:
        problems = super()._refused()
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            problems.append(Problem("momentum", self.momentum, "must be at least 0 and below 1"))
        if self.adamw_lr is not None and not (is_number(self.adamw_lr) and self.adamw_lr > 0):
            problems.append(Problem("adamw_lr", self.adamw_lr, "must be a finite number above 0, or None"))
        return problems


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the groups that have a `momentum`, AdamW for those that have `betas`.

    Muon's update of a matrix is its momentum with all singular values set to about 1, times `RMS` x sqrt(the longer
    side) (Liu et al. 2025, section 2.2), so rate and weight decay mean the same as for AdamW. It equals
    `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, with three differences. A group's `rows` is the number of
    rows of each matrix that is fused in its parameters; each matrix is made orthogonal separately. A parameter with
    three dimensions is a stack of matrices. Products are float32 on a CPU and bfloat16 on a GPU.

    Matrices that are sharded or split are gathered for it, and every rank that has a part computes the whole update.

    Args:
        params: groups, each with `lr`, `weight_decay`, and `momentum` and `rows` or `betas` and `eps`; all float32.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {})
        self.layout: Layout | None = None
        """The places of this rank's parts of the parameters in `split`."""
        self.split: dict[torch.Tensor, str] = {}
        """The parameters of which tensor-parallel ranks have parts, and their names."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the device is not waited for."""
        loss = loss_of(closure)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if "momentum" in group:
                for parameter in parameters:
                    self._muon(parameter, group)
            elif parameters:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # type: ignore[union-attr]  # Nesterov's
        if isinstance(update, DTensor):
            update = update.to(_product_dtype(update)).full_tensor()  # type: ignore[attr-defined]
        name = self.split.get(parameter)
        if name is None or self.layout is None:
            update = orthogonal_update(update, group["rows"])
        else:
            whole = self.layout.gather(name, update.to(_product_dtype(update)))
            update = self.layout.own(name, orthogonal_update(whole, group["rows"]))
        update = update[fsdp_slices(parameter)]
        own = local(parameter)
        own.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _adamw(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        kept = [[self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq", "step")]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            kept[0],
            kept[1],
            [],
            kept[2],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def orthogonal_update(update: torch.Tensor, rows: Sequence[int] | None) -> torch.Tensor:
    """Muon's update of a parameter, (..., m, n), that fuses matrices with these `rows`, whose sum is m."""
    matrices = update.split(list(rows), dim=-2) if rows else [update]
    return torch.cat([orthogonalize(m) * (RMS * math.sqrt(max(m.shape[-2:]))) for m in matrices], dim=-2)


def orthogonalize(matrices: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Keeps the singular vectors of matrices (..., m, n) and sets the singular values to about 1 (Newton-Schulz).

    Matrices that are (almost) 0 stay so.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(_product_dtype(matrices))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller of the two products with itself
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _product_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.device.type == "cuda" else torch.float32


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix of a layer, or a stack with one for each expert; experts' biases are not."""
    return "layers" in name.split(".") and name.endswith(".weight") and parameter.dim() >= 2
