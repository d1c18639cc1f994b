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
        return _normed(x.to(self.weight.dtype), self.weight, self.eps).to(x.dtype)  # autocast would leave it in float32


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm that multiplies by 1 + weight, so weight decay moves the factor towards 1."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same, in float32 inside: 1 + weight would lose what bfloat16 holds near 0."""
        return _normed(x.float(), 1 + self.weight.float(), self.eps).to(x.dtype)


def norm(config: TransformerConfig) -> nn.Module:
    """A norm of hidden states, of the kind that the config names."""
    if config.normalization == "LayerNorm":
        return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return rms_norm(config, config.hidden_size)


def rms_norm(config: TransformerConfig, size: int) -> nn.Module:
    """An RMSNorm of `size` channels."""
    kind = ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
    return kind(size, eps=config.layernorm_epsilon)


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
