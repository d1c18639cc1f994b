"""What an attention call needs, apart from its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention call asks of a kernel; two calls with equal specs are served by the same backend.

    `num_query_groups` is the number of key/value heads: 1 is multi-query attention, `num_attention_heads` is
    multi-head attention, a divisor between them is grouped-query attention (Ainslie et al. 2023).
    """

    dtype: torch.dtype
    head_dim: int
    num_attention_heads: int
    num_query_groups: int
    causal: bool = True
    dropout: float = 0.0


@dataclass(frozen=True)
class Target:
    """Where a call would run; it need not be this machine."""

    device_type: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Target:
        """The device that holds `tensor`."""
        return cls(tensor.device.type)
