"""The two passes of attention one by one: to a part of the keys, for ring attention, or of some heads at a time.

The results of several parts become those of all keys by the logarithms of their softmaxes' sums. Shapes: B batch, T
queries, S keys of the part, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from fiddlehead.attention.attend import NOTHING, backend_for
from fiddlehead.attention.backends.backend import Backend, Extras, Passes
from fiddlehead.attention.backends.masks import segments
from fiddlehead.attention.backends.operators import errors_explained
from fiddlehead.attention.call import NO_LIMIT, Call
from fiddlehead.attention.spec import AttentionSpec

Tensor = torch.Tensor


class Part(NamedTuple):
    """How queries attend to a part of the keys; the fields are named as in `attend`."""

    scale: float
    causal: bool = False
    window_size: tuple[int, int] = NO_LIMIT
    softcap: float = 0.0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    training: bool = True
    """Whether gradients are wanted."""
    backend: str = "auto"


def attend_to_part(q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Attends to some of the keys, or to all; without gradients, which `part_gradients` computes.

    Args:
        q: (B, T, H, D); packed sequences may also be (tokens, H, D).
        k: (B, S, G, D), or packed (tokens, G, D); v is like it.

    Returns:
        The output, like q, and the logarithm of each softmax's sum, (B, H, T) or packed (H, tokens), in float32, or
        float64 for float64. It is -inf where a query sees no key.

    Raises:
        ConfigError: no backend can serve the call.
    """
    if part.cu_seqlens_q is not None and q.dim() == 4:
        out, lse = attend_to_part(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), part)
        return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    spec, backend, extras = _choice(q, k, v, part)
    return forward(backend, q, k, v, spec, part.scale, extras)


def part_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    part: Part,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a part of the keys adds to the gradients of q, and the gradients of its own k and v.

    Args:
        dout: the gradient of `out`.
        out: the output over all keys, not only over this part.
        lse: the logarithm of the softmax's sum over all keys, as `attend_to_part` returns that of one part; +inf where
            a query sees no key at all.
    """
    if part.cu_seqlens_q is not None and q.dim() == 4:
        dout, packed_q, packed_k, packed_v, out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        packed_lse = lse.transpose(0, 1).flatten(1)
        gradients = part_gradients(dout, packed_q, packed_k, packed_v, out, packed_lse, part)
        dq, dk, dv = (found.view(x.shape) for found, x in zip(gradients, (q, k, v), strict=True))
        return dq, dk, dv
    spec, backend, extras = _choice(q, k, v, part)
    return backward(backend, dout, q, k, v, out, lse, spec, part.scale, extras)


def forward(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> tuple[Tensor, Tensor]:
    """`attend_to_part` by a backend that was chosen."""
    with errors_explained(backend.NAME, "".join(backend.SWITCHES[-1:])):
        out, lse, _ = _passes(backend).forward(q, k, v, spec, scale, extras)
    if extras.cu_seqlens_q is not None and extras.cu_seqlens_k is not None:
        # flash-attn 4 on Hopper lets queries without keys see those of the document before.
        alone = _alone(extras.cu_seqlens_q, extras.cu_seqlens_k, len(q))
        out, lse = out.masked_fill_(alone[:, None, None], 0.0), lse.masked_fill_(alone, float("-inf"))
    return out, lse


def backward(
    backend: Backend,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
) -> tuple[Tensor, Tensor, Tensor]:
    """`part_gradients` by a backend that was chosen."""
    state = torch.empty(2, dtype=torch.int64, device=q.device)  # from which a dropout would be drawn
    with errors_explained(backend.NAME, "".join(backend.SWITCHES[-1:])):
        dq, dk, dv, _ = _passes(backend).backward(dout, q, k, v, out, lse, state, spec, scale, extras)
    if extras.cu_seqlens_q is not None and extras.cu_seqlens_k is not None:
        dq.masked_fill_(_alone(extras.cu_seqlens_q, extras.cu_seqlens_k, len(q))[:, None, None], 0.0)
        unseen = _alone(extras.cu_seqlens_k, extras.cu_seqlens_q, len(k))[:, None, None]
        dk, dv = dk.masked_fill_(unseen, 0.0), dv.masked_fill_(unseen, 0.0)
    return dq, dk, dv


def _alone(cu_seqlens: Tensor, of_others: Tensor, tokens: int) -> Tensor:
    """Which tokens are in no document, or in one that has none of the others, (tokens,) bool."""
    has_others = F.pad(of_others.diff() > 0, (0, 1))
    return ~has_others[segments(cu_seqlens, tokens)]


def _choice(q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[AttentionSpec, Backend, Extras]:
    packed = part.cu_seqlens_q is not None
    call = Call(
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        k.dtype,
        v.dtype,
        part.max_seqlen_q if packed else None,
        part.max_seqlen_k if packed else None,
        causal=part.causal,
        window_size=part.window_size,
        softcap=part.softcap,
        training=part.training,
        packed=packed,
        by_passes=True,
    )
    spec, backend, _ = backend_for(call, q.device, part.backend)
    if not packed:
        return spec, backend, NOTHING
    return spec, backend, Extras(part.cu_seqlens_q, part.cu_seqlens_k, part.max_seqlen_q, part.max_seqlen_k)


def _passes(backend: Backend) -> Passes:
    return cast(Passes, backend.PASSES)  # type: ignore[attr-defined]  # a spec that is `by_passes` goes to no other
