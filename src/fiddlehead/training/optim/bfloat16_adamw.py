"""AdamW for bfloat16 parameters that loses no small steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fiddlehead.models.parallel import local
from fiddlehead.training.optim.offloaded import KeepsState, Offloaded, Update
from fiddlehead.training.optim.optim import loss_of


class BFloat16AdamW(KeepsState):
    """AdamW (Loshchilov & Hutter 2019) on float32 weights; the parameters are the upper half of their bits.

    A bfloat16 has 8 bits of precision: rounding would remove a step of less than 1/512 of a weight. Here each weight is
    a float32, the parameter is its rounded value, and the other 16 bits are in the optimizer's state. This takes half
    the memory of a second copy, and the weights are the same as those of AdamW in float32.

    Args:
        params: parameters or groups of them, all bfloat16.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
    """

    gradient_factor: torch.Tensor | None = None
    """A scalar on the device that multiplies all gradients in the next step; None: 1. `clip` sets it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the host does not wait for the device."""
        loss = loss_of(closure)
        gradient_factor, self.gradient_factor = self.gradient_factor, None
        updates: list[Update] = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                self._make_state(parameter)
            device = parameters[0].device
            step = self.kept(parameters[0])["step"] + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            factors = [1.0, lr * group["weight_decay"], lr / (1 - beta1**step), (1 - beta2**step) ** 0.5]
            filled = [torch.full((), factor, dtype=torch.float32, device=device) for factor in factors]  # no copy
            scalars = torch.stack(filled if gradient_factor is None else [gradient_factor.float(), *filled[1:]])
            for parameter in parameters:
                state = self.kept(parameter)
                state["step"] = step
                tensors = [parameter, parameter.grad, state["low_bits"], state["exp_avg"], state["exp_avg_sq"]]
                weight, gradient, low_bits, exp_avg, exp_avg_sq = (local(tensor).view(-1) for tensor in tensors)
                flat = weight, gradient, low_bits, exp_avg, exp_avg_sq
                updates.append(Update(*flat, scalars, beta1, beta2, group["eps"]))
        if updates:
            self.take(updates, _kernel() if updates[0].weight.is_cuda else update_weight)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, which would convert the state to the parameters' dtype."""
        kept = {number: dict(state) for number, state in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, state in kept.items():
            parameter = parameters[int(number)]
            moved = {name: _to(value, parameter.device) for name, value in state.items()}
            self.state[parameter].update(moved)

    def _make_state(self, parameter: nn.Parameter) -> None:
        state = self.kept(parameter)
        if not state:
            state["step"] = 0
            state["low_bits"] = self.zeros(parameter, torch.bfloat16)  # a dtype that ranks can send each other
            state["exp_avg"] = self.zeros(parameter, torch.float32)
            state["exp_avg_sq"] = self.zeros(parameter, torch.float32)


class OffloadedBFloat16AdamW(Offloaded, BFloat16AdamW):
    """`BFloat16AdamW` with its state in main memory."""


def update_weight(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    low_bits: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of one parameter as in `adamw_kernel.update_weight`, for a CPU."""
    factor, decay, step_size, correction = scalars
    high, low = parameter.view(torch.int16), low_bits.view(torch.int16)
    weight = ((high.to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)
    g = gradient.float() * factor
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * g * g)
    weight = weight - decay * weight - step_size * exp_avg / (exp_avg_sq.sqrt() / correction + eps)
    bits = weight.view(torch.int32)
    rounded = (bits + 0x8000) >> 16  # to the nearest; what is left over fits in 16 bits with a sign
    high.copy_(rounded.to(torch.int16))
    low.copy_((bits - (rounded << 16)).to(torch.int16))


def _kernel() -> Callable[..., None]:
    from fiddlehead.training.optim import adamw_kernel

    return adamw_kernel.update_weight


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
