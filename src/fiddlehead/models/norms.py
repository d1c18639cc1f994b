"""The norms of a transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fiddlehead.models.config import TransformerConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019). The input may be narrower than the weight, as in mixed precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same, in x's dtype."""
        return rms_normed(x, self.weight, self.eps, zero_centered=False)


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm that multiplies by 1 + weight, so weight decay moves the factor towards 1."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same, in x's dtype."""
        return rms_normed(x, self.weight, self.eps, zero_centered=True)


def norm(config: TransformerConfig) -> nn.Module:
    """A norm of hidden states, of the kind that the config names."""
    if config.normalization == "LayerNorm":
        return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return rms_norm(config, config.hidden_size)


def rms_norm(config: TransformerConfig, size: int) -> nn.Module:
    """An RMSNorm of `size` channels."""
    kind = ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
    return kind(size, eps=config.layernorm_epsilon)


def rms_normed(x: torch.Tensor, weight: torch.Tensor, eps: float | None, *, zero_centered: bool) -> torch.Tensor:
    """What an RMSNorm gives, in x's dtype; autocast would leave it in float32."""
    if zero_centered:  # in float32 inside: 1 + weight would lose what bfloat16 holds near 0
        return _normed(x.float(), 1 + weight.float(), eps).to(x.dtype)
    return _normed(x.to(weight.dtype), weight, eps).to(x.dtype)


def rms_norm_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `rms_normed` without autograd: of x in its dtype, and of the weight in float32 at least.

    Args:
        grad: the gradient of what the norm gave, like x, (..., size).
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(x.dtype, weight.dtype))
    x, grad, weight, given = x.to(dtype), grad.to(dtype), weight.to(dtype), x.dtype
    factor = x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    normed = x * factor
    of_weight = (grad * normed).flatten(0, -2).sum(dim=0)
    grad = grad * (1 + weight if zero_centered else weight)
    along = (grad * normed).mean(dim=-1, keepdim=True)
    return grad.sub_(normed * along).mul_(factor).to(given), of_weight


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float | None) -> torch.Tensor:
    """`F.rms_norm`, which on a CPU is many operations with gradients of their own."""
    on_cpu = x.is_cpu and x.dtype == weight.dtype == torch.float32 and eps is not None
    if on_cpu and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")):
        return _RMSNormOnCPU.apply(x, weight, eps)  # type: ignore[return-value]
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNormOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * factor
        ctx.save_for_backward(normed, weight, factor)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        normed, weight, factor = ctx.saved_tensors
        size = weight.numel()
        along = (grad * normed).reshape(-1, size)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            through_factor = (along @ weight).view(factor.shape).div_(-size)
            grad_x = (grad * weight).addcmul_(normed, through_factor).mul_(factor)
        if ctx.needs_input_grad[1]:
            grad_weight = along.sum(dim=0)
        return grad_x, grad_weight, None
