"""The norms of a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fiddlehead.models.config import TransformerConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019). The input may be narrower than the weight, as in mixed precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same, in x's dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)  # autocast would leave it in float32


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm that multiplies by 1 + weight, so weight decay moves the factor towards 1."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same, in float32 inside: 1 + weight would lose what bfloat16 holds near 0."""
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


def norm(config: TransformerConfig) -> nn.Module:
    """A norm of hidden states, of the kind that the config names."""
    if config.normalization == "LayerNorm":
        return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return rms_norm(config, config.hidden_size)


def rms_norm(config: TransformerConfig, size: int) -> nn.Module:
    """An RMSNorm of `size` channels."""
    kind = ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
    return kind(size, eps=config.layernorm_epsilon)
