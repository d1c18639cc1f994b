"""The one attention function that models call."""

from __future__ import annotations

import math

import torch

from fiddlehead.attention.selection import BACKENDS, select
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.errors import ConfigError


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Scaled dot-product attention in flash-attn's layout, with grouped key/value heads.

    Query head h reads key/value head h // (H / G), so K and V keep their G heads and are not repeated in memory
    where the kernel reads groups itself.

    Args:
        q: queries, (B, T, H, D).
        k: keys, (B, S, G, D), where G divides H.
        v: values, (B, S, G, D).
        causal: query t sees keys up to t + S - T, that is, the last query sees every key (flash-attn's alignment).
        dropout: probability with which an attention weight is zeroed.
        scale: factor on the scores; 1 / sqrt(D) if None.
        backend: "auto", or the name of a backend.

    Returns:
        (B, T, H, D), in q's dtype.

    Raises:
        ConfigError: the shapes do not fit together, or no backend can serve the call.
    """
    B, T, H, D = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    S, G = k.shape[1:3] if k.dim() == 4 else (0, 0)
    if not G or k.shape != (B, S, G, D) or v.shape != k.shape or H % G:
        raise ConfigError(
            f"q{tuple(q.shape)}, k{tuple(k.shape)}, v{tuple(v.shape)} do not fit: "
            "expected (B, T, H, D), (B, S, G, D), (B, S, G, D) with G dividing H"
        )
    if causal and T > S:
        raise ConfigError(f"q has {T} positions and k only {S}: under a causal mask the first queries would see no key")
    spec = AttentionSpec(q.dtype, D, H, G, causal, dropout)
    name = select(spec, Target.of(q), backend)
    return BACKENDS[name].run(q, k, v, spec, 1 / math.sqrt(D) if scale is None else scale)
