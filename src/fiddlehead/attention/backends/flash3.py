"""flash-attn 3 (Shah et al. 2024), built from the `hopper` folder of flash-attention's repository: Hopper."""

from __future__ import annotations

import torch

from fiddlehead.attention.backends.backend import Extras, Passes, generation
from fiddlehead.attention.backends.operators import contiguous_like, register
from fiddlehead.attention.backends.sdpa import HALF, dtype_name, first, outside
from fiddlehead.attention.packages import function
from fiddlehead.attention.spec import AttentionSpec, Target

Tensor = torch.Tensor

NAME = "flash3"
PLACE = 20
SWITCHES: tuple[str, ...] = ("NVTE_FLASH_ATTN", "NVTE_FLASH_ATTN_V3")


def place(spec: AttentionSpec, target: Target) -> float | None:
    """First on Hopper once sequences are long."""
    return PLACE if generation(spec, target) == "hopper" else None


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The rules are those of its hopper/flash_api.cpp, in 3.0.0."""
    return (
        first(
            [
                # It can be built with kernels for these, too, which are those of flash-attn 2 made over.
                (80 <= target.sm < 90, f"sm{target.sm}: made for sm90 (Hopper) (preference)"),
                (target.device_type == "cuda" and target.sm != 90, f"sm{target.sm}: made for sm90 (Hopper)"),
                outside(target, 90, 90),
            ]
        )
        or target.packages.flash3.why_not("flash-attn-3")
        or first(
            [
                (spec.dtype not in HALF, f"{dtype_name(spec)}: only float16 and bfloat16"),
                (spec.head_dim % 8, f"head_dim={spec.head_dim}: only multiples of 8"),
                (spec.head_dim > 256, f"head_dim={spec.head_dim}: at most 256"),
                (
                    spec.deterministic and spec.training and spec.head_dim > 192,
                    f"deterministic: not with head_dim={spec.head_dim}, but up to 192",
                ),
                (spec.dropout, "dropout: flash-attn 3 has none"),
                (spec.alibi, "alibi: flash-attn 3 has none"),
                (spec.sinks, "sinks: flash-attn 3 has none"),
                (spec.padding_mask, "padding_mask: takes none; pack the sequences instead (cu_seqlens)"),
                (spec.cached and spec.training, "cache: has no gradients"),
            ]
        )
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = spec.window_size
    out, lse, *_ = function("flash3", "_flash_attn_forward")(
        q,
        k,
        v,
        cu_seqlens_q=extras.cu_seqlens_q,
        cu_seqlens_k=extras.cu_seqlens_k,
        max_seqlen_q=extras.max_seqlen_q if spec.packed else None,
        max_seqlen_k=extras.max_seqlen_k if spec.packed else None,
        softmax_scale=scale,
        causal=spec.causal,
        window_size_left=left,
        window_size_right=right,
        softcap=spec.softcap,
        # 0: the kernel splits the keys as it thinks best, without which decoding leaves most of the GPU idle.
        num_splits=1 if spec.training else 0,
    )
    return out, lse, q.new_empty(0, dtype=torch.int64)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
) -> tuple[Tensor, Tensor, Tensor, None]:
    left, right = spec.window_size
    dq, dk, dv = contiguous_like(q, k, v)
    function("flash3", "_flash_attn_backward")(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q=extras.cu_seqlens_q,
        cu_seqlens_k=extras.cu_seqlens_k,
        max_seqlen_q=extras.max_seqlen_q if spec.packed else None,
        max_seqlen_k=extras.max_seqlen_k if spec.packed else None,
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=scale,
        is_causal=spec.causal,
        window_size_left=left,
        window_size_right=right,
        softcap=spec.softcap,
        deterministic=spec.deterministic,
    )
    return dq, dk, dv, None


def _from_cache(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras) -> Tensor:
    return function("flash3", "flash_attn_with_kvcache")(
        q,
        k,
        v,
        cache_seqlens=extras.cache_lengths,
        page_table=extras.page_table,
        softmax_scale=scale,
        causal=spec.causal,
        window_size=spec.window_size,
        softcap=spec.softcap,
    )


PASSES = Passes(_forward, _backward)
run = register(NAME, _forward, _backward, _from_cache, switch=SWITCHES[-1])
