"""PyTorch's scaled_dot_product_attention, which picks a kernel of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fiddlehead.attention.spec import AttentionSpec, Target


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """It serves every floating-point call."""
    if not spec.dtype.is_floating_point:
        return f"needs a floating-point dtype, not {spec.dtype}"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float) -> torch.Tensor:
    """Attend: q (B, T, H, D), k and v (B, S, G, D); returns (B, T, H, D)."""
    T, S = q.shape[1], k.shape[1]
    mask = None
    if spec.causal and 1 < T < S:  # is_causal would align the mask top-left; a single query sees every key anyway
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=spec.dropout,
        is_causal=spec.causal and T == S,
        scale=scale,
        enable_gqa=spec.num_query_groups != spec.num_attention_heads,
    )
    return out.transpose(1, 2)
