"""Attention written out in float32 (float64 for float64 inputs): it defines what is right, not what is fast."""

from __future__ import annotations

import torch

from fiddlehead.attention.spec import AttentionSpec, Target


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """It serves every floating-point call, in memory quadratic in the sequence length."""
    if not spec.dtype.is_floating_point:
        return f"needs a floating-point dtype, not {spec.dtype}"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float) -> torch.Tensor:
    """Attend: q (B, T, H, D), k and v (B, S, G, D); returns (B, T, H, D) in q's dtype."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTGRD = q.to(dtype).view(B, T, G, H // G, D)  # R: the query heads that share a key/value head
    with torch.autocast(q.device.type, enabled=False):  # which would make the products bfloat16
        scores = torch.einsum("btgrd,bsgd->bgrts", q_BTGRD, k.to(dtype)) * scale
        if spec.causal:
            visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
            scores = scores.masked_fill(~visible, float("-inf"))
        weights = torch.dropout(scores.softmax(dim=-1), spec.dropout, train=spec.dropout > 0)
        out = torch.einsum("bgrts,bsgd->btgrd", weights, v.to(dtype))
    return out.reshape(B, T, H, D).to(q.dtype)
