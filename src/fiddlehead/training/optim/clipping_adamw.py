"""AdamW for float32 parameters that clips the gradients within its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import unwrap
from typing import Any

import torch

from fiddlehead.models.parallel import local
from fiddlehead.training.distributed.gradients import scale
from fiddlehead.training.optim.offloaded import KeepsState, Offloaded, Update
from fiddlehead.training.optim.optim import loss_of


class ClippingAdamW(KeepsState, torch.optim.AdamW):
    """PyTorch's fused AdamW; on a GPU a kernel of ours multiplies each gradient by a factor where it is read.

    PyTorch's own would write the scaled gradients, and clipping before the step would read and write them once more.
    The state is PyTorch's.
    """

    takes_bfloat16_gradients = True
    """A kernel reads them as float32."""
    gradient_factor: torch.Tensor | None = None
    """A scalar on the device that multiplies all gradients in the next step; None: 1. `clip` sets it."""

    def __init__(self, params: Any, **settings: Any) -> None:
        """The arguments of `torch.optim.AdamW`, without its variants."""
        super().__init__(params, **settings, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the host does not wait for the device."""
        loss = loss_of(closure)
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        factor, self.gradient_factor = self.gradient_factor, None
        parameters = [parameter for _, each in groups for parameter in each]
        if not parameters:
            return loss
        if self._by_kernel(parameters):
            from fiddlehead.training.optim.adamw_kernel import update_weight

            updates = (update for group, each in groups for update in self._updates(group, each, factor))
            self.take(updates, update_weight)
            return loss
        for parameter in parameters:  # PyTorch's takes only those of the parameter's dtype
            parameter.grad = parameter.grad.to(parameter.dtype)  # type: ignore[union-attr]
        if factor is not None:
            scale({str(i): parameter.grad for i, parameter in enumerate(parameters)}, factor)
        unwrap(torch.optim.AdamW.step)(self)  # the hooks of a step are around this function already
        return loss

    def _by_kernel(self, parameters: Sequence[torch.Tensor]) -> bool:
        return all(parameter.device.type == "cuda" and parameter.dtype == torch.float32 for parameter in parameters)

    def _updates(
        self, group: dict[str, Any], parameters: Sequence[torch.Tensor], factor: torch.Tensor | None
    ) -> Iterator[Update]:
        """What the kernel does to the parameters of a group."""
        for parameter in parameters:
            state = self.kept(parameter)
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = (self.zeros(parameter, torch.float32) for _ in range(2))
        if not parameters:
            return
        steps = [self.kept(parameter)["step"] for parameter in parameters]
        torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
        (beta1, beta2), lr = group["betas"], group["lr"]
        done = torch.stack(steps).double()
        ones = torch.ones_like(done)
        factors = [
            ones if factor is None else ones * factor,
            ones * (lr * group["weight_decay"]),
            lr / (1 - beta1**done),
            (1 - beta2**done).sqrt(),
        ]
        for parameter, scalars in zip(parameters, torch.stack(factors, dim=1).float(), strict=True):
            state = self.kept(parameter)
            tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
            weight, gradient, exp_avg, exp_avg_sq = (local(tensor) for tensor in tensors)  # type: ignore[arg-type]
            flat = weight.view(-1), gradient.reshape(-1), None, exp_avg.view(-1), exp_avg_sq.view(-1)
            yield Update(*flat, scalars, beta1, beta2, group["eps"])


class OffloadedClippingAdamW(Offloaded, ClippingAdamW):
    """`ClippingAdamW` with its state in main memory; all parameters are float32."""

    def _by_kernel(self, parameters: Sequence[torch.Tensor]) -> bool:
        return True
