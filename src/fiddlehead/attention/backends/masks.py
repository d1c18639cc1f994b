"""Materialized masks, for backends that take a mask.

Shapes: B batch, T queries, S keys, H query heads; packed calls are one batch of all their tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fiddlehead.attention.backends.backend import Extras
from fiddlehead.attention.spec import AttentionSpec


def visible(T: int, S: int, spec: AttentionSpec, extras: Extras, device: torch.device) -> torch.Tensor | None:
    """A mask (B or 1, T, S), true where the query sees the key; None where every query sees every key."""
    if not (spec.causal or spec.window_size != (-1, -1) or spec.packed or spec.cached or spec.padding_mask):
        return None
    distance = positions_q(T, S, extras, device)[..., :, None] - positions_k(S, extras, device)[..., None, :]
    mask = torch.ones_like(distance, dtype=torch.bool)
    left, right = spec.window_size
    if spec.causal:
        mask &= distance >= 0
    elif right >= 0:
        mask &= distance >= -right
    if left >= 0:
        mask &= distance <= left
    if extras.cu_seqlens_q is not None:
        assert extras.cu_seqlens_k is not None
        segments_q = segments(extras.cu_seqlens_q, T)[:, None]
        mask &= segments_q == segments(extras.cu_seqlens_k, S)[None, :]
        mask &= segments_q < len(extras.cu_seqlens_q) - 1  # tokens after the last sequence see nothing
    mask = mask if mask.dim() == 3 else mask[None]
    if extras.cache_lengths is not None:
        mask = mask & (torch.arange(S, device=device) < extras.cache_lengths[:, None])[:, None, :]
    if extras.padding_mask is not None:
        mask = mask & extras.padding_mask[:, None, :]
    return mask


def seen(T: int, S: int, spec: AttentionSpec, extras: Extras) -> torch.Tensor:
    """Under a padding mask, true where a query sees any key, (B, T), in memory linear in the sequence length."""
    assert extras.padding_mask is not None and not spec.packed and not spec.cached
    before = F.pad(extras.padding_mask.cumsum(dim=1), (1, 0))  # how many real keys stand before each position
    position = positions_q(T, S, extras, before.device)
    left, right = spec.window_size
    right = 0 if spec.causal else right
    begin = (position - left).clamp(0, S) if left >= 0 else torch.zeros_like(position)
    end = (position + right + 1).clamp(0, S) if right >= 0 else torch.full_like(position, S)
    return before[:, end] > before[:, begin]


def alibi_bias(T: int, S: int, extras: Extras, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The ALiBi bias of the scores, (B or 1, H, T, S), in `dtype`."""
    assert extras.alibi_slopes is not None
    slopes = extras.alibi_slopes.to(dtype)
    device = slopes.device
    distance = positions_q(T, S, extras, device)[..., :, None] - positions_k(S, extras, device)[..., None, :]
    distance = distance.abs() if distance.dim() == 3 else distance.abs()[None]
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    return slopes[:, :, None, None] * distance[:, None]


def positions_q(T: int, S: int, extras: Extras, device: torch.device) -> torch.Tensor:
    """The position of each query among the keys, so that the last query stands at the last key; (T,) or (B, T)."""
    t = torch.arange(T, device=device)
    if extras.cu_seqlens_q is not None:
        assert extras.cu_seqlens_k is not None
        n = segments(extras.cu_seqlens_q, T).clamp(max=len(extras.cu_seqlens_q) - 2)
        # From the end of its own sequence in q to the end of its sequence in k, within which keys count from 0.
        lengths_k = extras.cu_seqlens_k.diff()
        return (t - extras.cu_seqlens_q[1:][n]) + lengths_k[n]
    if extras.cache_lengths is not None:
        return t - T + extras.cache_lengths[:, None]
    return t + S - T


def positions_k(S: int, extras: Extras, device: torch.device) -> torch.Tensor:
    """The position of each key in its sequence, (S,)."""
    s = torch.arange(S, device=device)
    if extras.cu_seqlens_k is not None:
        n = segments(extras.cu_seqlens_k, S).clamp(max=len(extras.cu_seqlens_k) - 2)
        return s - extras.cu_seqlens_k[n]
    return s


def segments(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The index of each token's sequence, (tokens,)."""
    t = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)


def gathered(pages: torch.Tensor, extras: Extras) -> torch.Tensor:
    """A paged cache (all pages, page size, G, D) as (B, S, G, D), by copying; other tensors as they are."""
    if extras.page_table is None:
        return pages
    return pages[extras.page_table.long()].flatten(1, 2)
