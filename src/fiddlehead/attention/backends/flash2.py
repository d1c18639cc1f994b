"""flash-attn 2 (Dao 2023), the package `flash-attn`: Ampere and later, with dropout and ALiBi."""

from __future__ import annotations

import torch

from fiddlehead.attention.backends.backend import Extras, Passes, generation
from fiddlehead.attention.backends.operators import contiguous_like, register
from fiddlehead.attention.backends.sdpa import HALF, dtype_name, first, outside
from fiddlehead.attention.packages import function
from fiddlehead.attention.spec import AttentionSpec, Target

Tensor = torch.Tensor

NAME = "flash2"
PLACE = 10
SWITCHES: tuple[str, ...] = ("NVTE_FLASH_ATTN", "NVTE_FLASH_ATTN_V2")


def place(spec: AttentionSpec, target: Target) -> float | None:
    """First on Ampere; behind flash-attn 3 and 4 and cuDNN on newer GPUs."""
    return {"ampere": PLACE, "hopper": 45, "blackwell": 45}.get(generation(spec, target))


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The rules are those of its csrc/flash_attn/flash_api.cpp and flash_bwd_launch_template.h, in 2.7 to 2.8."""
    package = target.packages.flash2
    small = target.sm in (86, 89) or target.sm >= 120  # 99 KiB of shared memory
    return (
        first([outside(target, 80, 121)])
        or package.why_not("flash-attn", oldest="2.7.3" if target.sm >= 100 else "2.7.0")
        or first(
            [
                (spec.dtype not in HALF, f"{dtype_name(spec)}: only float16 and bfloat16"),
                (spec.head_dim > 256, f"head_dim={spec.head_dim}: at most 256"),
                (
                    spec.head_dim % 8,
                    f"head_dim={spec.head_dim}: only multiples of 8, to which it would pad copies (preference)",
                ),
                (
                    spec.training and small and spec.head_dim > 192 and spec.dropout,
                    f"head_dim={spec.head_dim} with dropout: no gradients above 192 on sm{target.sm}",
                ),
                (spec.softcap and spec.dropout, "softcap with dropout: only one of them"),
                (spec.sinks, "sinks: flash-attn 2 has none"),
                (spec.padding_mask, "padding_mask: takes none; pack the sequences instead (cu_seqlens)"),
                (spec.cached and spec.training, "cache: has no gradients"),
                (spec.cached and spec.dropout, "cache: has no dropout"),
                (spec.page_size % 256, f"page_size={spec.page_size}: only multiples of 256"),
            ]
        )
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = spec.window_size
    options = {
        "dropout_p": spec.dropout,
        "softmax_scale": scale,
        "causal": spec.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": spec.softcap,
        "alibi_slopes": extras.alibi_slopes,
        "return_softmax": False,
    }
    if spec.packed:
        out, lse, *rest = function("flash2", "_flash_attn_varlen_forward")(q, k, v, **_borders(extras), **options)
    else:
        # Splits the keys by itself where there are few queries, so that decoding fills the GPU.
        out, lse, *rest = function("flash2", "_flash_attn_forward")(q, k, v, **options)
    return out, lse, rest[-1]  # the state of the random numbers


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
    options = {
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "dropout_p": spec.dropout,
        "softmax_scale": scale,
        "causal": spec.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": spec.softcap,
        "alibi_slopes": extras.alibi_slopes,
        "deterministic": spec.deterministic,
        "rng_state": rng_state,
    }
    if spec.packed:
        function("flash2", "_flash_attn_varlen_backward")(dout, q, k, v, out, lse, **_borders(extras), **options)
    else:
        function("flash2", "_flash_attn_backward")(dout, q, k, v, out, lse, **options)
    return dq, dk, dv, None


def _borders(extras: Extras) -> dict[str, object]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return {name: getattr(extras, name) for name in names}


def _from_cache(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras) -> Tensor:
    return function("flash2", "flash_attn_with_kvcache")(
        q,
        k,
        v,
        cache_seqlens=extras.cache_lengths,
        block_table=extras.page_table,
        softmax_scale=scale,
        causal=spec.causal,
        window_size=spec.window_size,
        softcap=spec.softcap,
        alibi_slopes=extras.alibi_slopes,
    )


PASSES = Passes(_forward, _backward)
run = register(NAME, _forward, _backward, _from_cache, switch=SWITCHES[-1], random=True)
