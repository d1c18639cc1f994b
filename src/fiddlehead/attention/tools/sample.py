"""Random inputs of a call, for timing a kernel and for trying it out.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fiddlehead.attention.backends.backend import Extras
from fiddlehead.attention.spec import AttentionSpec

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Shape(NamedTuple):
    """The sizes of one call that a spec leaves open."""

    batch: int
    """Sequences; for a packed call, the number of longest sequences that would hold its tokens."""
    length_q: int
    length_k: int


def sample(spec: AttentionSpec, device: torch.device, shape: Shape) -> tuple[Inputs, Extras]:
    """q, k and v, unit normal, with the sizes of a call, and the call's other tensors."""
    B, T, S = shape.batch, shape.length_q, shape.length_k
    H, G, D = spec.num_attention_heads, spec.num_query_groups, spec.head_dim
    generator = torch.Generator(device).manual_seed(0)  # its own: the model's numbers must not depend on it
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}

    def draw(*size: int) -> torch.Tensor:
        made = torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(spec.dtype)
        return made.requires_grad_(spec.training)

    extras = Extras(
        padding_mask=torch.ones(B, S, dtype=torch.bool, device=device) if spec.padding_mask else None,
        alibi_slopes=torch.linspace(0.01, 1, H, device=device) if spec.alibi else None,
        sinks=torch.zeros(H, device=device, dtype=spec.dtype) if spec.sinks else None,
    )
    if spec.packed:
        extras = extras._replace(
            cu_seqlens_q=torch.arange(0, B + 1, **int32) * T,
            cu_seqlens_k=torch.arange(0, B + 1, **int32) * S,
            max_seqlen_q=T,
            max_seqlen_k=S,
        )
        return (draw(B * T, H, D), draw(B * S, G, D), draw(B * S, G, D)), extras
    if spec.cached:
        extras = extras._replace(cache_lengths=torch.full((B,), S, **int32))
    if spec.page_size:
        pages = -(-S // spec.page_size)
        extras = extras._replace(page_table=torch.arange(B * pages, **int32).view(B, pages))
        stored = (B * pages, spec.page_size, G, D)
        return (draw(B, T, H, D), draw(*stored), draw(*stored)), extras
    return (draw(B, T, H, D), draw(B, S, G, D), draw(B, S, G, D)), extras
