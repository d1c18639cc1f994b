"""flash-attn 4, the package `flash-attn-4`, whose kernels are compiled when first called: Hopper and Blackwell.

The kernel also reads the unused rest of a cache's last page and multiplies it by zero, so it must not contain NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from fiddlehead.attention.backends.backend import FIRST, Extras, Passes, generation
from fiddlehead.attention.backends.hopper import NARROW, cudnn_starts_first, gradient_padding, is_decoding
from fiddlehead.attention.backends.operators import contiguous_like, register
from fiddlehead.attention.backends.sdpa import HALF, dtype_name, first, outside
from fiddlehead.attention.packages import function
from fiddlehead.attention.spec import AttentionSpec, Target

Tensor = torch.Tensor

NAME = "flash4"
PLACE = 30
SWITCHES: tuple[str, ...] = ("NVTE_FLASH_ATTN", "NVTE_FLASH_ATTN_V4")


def place(spec: AttentionSpec, target: Target) -> float | None:
    """First on Blackwell; on Hopper, as an H100 measured it, where it is ahead of flash-attn 3."""
    kind = generation(spec, target)
    if kind != "hopper":
        return {"ampere": 42, "blackwell": PLACE}.get(kind)
    if is_decoding(spec):  # on Hopper it cannot split the keys of few queries among the GPU's multiprocessors
        return 52
    narrow = spec.head_dim <= NARROW
    if cudnn_starts_first(spec):
        ahead = False
    elif spec.training:
        ahead = not gradient_padding(spec.head_dim) and (0 < spec.length <= 2048 or (narrow and spec.packed))
    else:
        multi_head = spec.num_query_groups == spec.num_attention_heads
        ahead = narrow and not (multi_head and not spec.packed and 0 < spec.length <= 4096)
    return FIRST if ahead else PLACE


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The rules are those of its flash_attn/cute/interface.py and the kernels it calls, in 4.0.0b36."""
    family, D = target.sm // 10, spec.head_dim
    blackwell = family in (10, 11)
    return (
        first([outside(target, 80, 121)])
        or target.packages.flash4.why_not("flash-attn-4", oldest="4.0.0b36")
        or first(
            [
                (spec.training and family == 8, f"training: no gradients on sm{target.sm}"),
                (spec.dtype not in HALF, f"{dtype_name(spec)}: only float16 and bfloat16"),
                (D % 8, f"head_dim={D}: only multiples of 8"),
                _head_dim_too_large(spec, target),
                (spec.dropout, "dropout: flash-attn 4 has none"),
                (spec.alibi, "alibi: flash-attn 4 takes no slopes"),
                (spec.padding_mask, "padding_mask: takes none; pack the sequences instead (cu_seqlens)"),
                (spec.sinks and family in (8, 12), f"sinks: has none on sm{target.sm}"),
                (
                    spec.deterministic and spec.training and family == 12,
                    f"deterministic: its gradients are not, on sm{target.sm}",
                ),
                *(
                    (blackwell and spec.training and D == 256 and asked, f"{name}: no gradients with head_dim=256")
                    for name, asked in (
                        ("softcap", spec.softcap),
                        ("sinks", spec.sinks),
                        ("window", spec.window_size != (-1, -1)),
                    )
                ),
                # Those of the lengths alone would work.
                (spec.cached and spec.training, f"cache: has no gradients{'' if spec.page_size else ' (preference)'}"),
                (spec.page_size and family in (8, 12), f"paged cache: has none on sm{target.sm}"),
                (
                    spec.page_size and family == 9 and D % 16,
                    f"paged cache: on sm{target.sm} only with head dims that are multiples of 16, not {D}",
                ),
            ]
        )
    )


def _head_dim_too_large(spec: AttentionSpec, target: Target) -> tuple[bool, str]:
    D = spec.head_dim
    if target.sm // 10 in (10, 11):
        return D > 128 and D != 256, f"head_dim={D}: at most 128, or 256, on sm{target.sm}"
    # Its tiles of queries, keys and values take 512 x D bytes of shared memory, and there are 99 KiB; backward also
    # 16 KiB of scores and their gradients.
    small = target.sm in (86, 89) or target.sm >= 120
    largest = (160 if spec.training else 192) if small else 256
    return largest < D, f"head_dim={D}: at most {largest} on sm{target.sm}{' in training' if largest == 160 else ''}"


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _window(spec)
    out, lse, *_ = function("flash4", "_flash_attn_fwd")(
        q,
        k,
        v,
        cu_seqlens_q=extras.cu_seqlens_q,
        cu_seqlens_k=extras.cu_seqlens_k,
        max_seqlen_q=extras.max_seqlen_q if spec.packed else None,
        max_seqlen_k=extras.max_seqlen_k if spec.packed else None,
        softmax_scale=scale,
        causal=spec.causal,
        softcap=spec.softcap,
        window_size_left=left,
        window_size_right=right,
        learnable_sink=extras.sinks,
        num_splits=1 if spec.training or spec.packed else _splits(q.device),
        return_lse=spec.training or spec.by_passes,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    left, right = _window(spec)
    D, padding = spec.head_dim, gradient_padding(spec.head_dim) if _on_hopper(q.device) else 0
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
        out, dout = (F.pad(x, (0, padding)) for x in (out, dout))
    dq, dk, dv = contiguous_like(q, k, v)
    gradients = function("flash4", "_flash_attn_bwd")(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=scale,
        causal=spec.causal,
        softcap=spec.softcap,
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=extras.cu_seqlens_q,
        cu_seqlens_k=extras.cu_seqlens_k,
        max_seqlen_q=extras.max_seqlen_q if spec.packed else None,
        max_seqlen_k=extras.max_seqlen_k if spec.packed else None,
        deterministic=spec.deterministic,
        dq=dq,
        dk=dk,
        dv=dv,
        learnable_sink=extras.sinks,
    )
    if padding:
        dq, dk, dv = (x[..., :D].contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, gradients[3] if extras.sinks is not None else None


def _from_cache(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras) -> Tensor:
    return function("flash4", "flash_attn_varlen_func")(
        q,
        k,
        v,
        seqused_k=extras.cache_lengths,
        page_table=extras.page_table,
        softmax_scale=scale,
        causal=spec.causal,
        window_size=_window(spec),
        learnable_sink=extras.sinks,
        softcap=spec.softcap,
        num_splits=_splits(q.device),
    )[0]


def _window(spec: AttentionSpec) -> tuple[int | None, int | None]:
    """The window with None for no limit: of one side alone, -1 would be a limit."""
    left, right = spec.window_size
    return (left if left >= 0 else None, right if right >= 0 else None)


@lru_cache
def _on_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
def _splits(device: torch.device) -> int:
    """0 on GPUs where the kernel can split the keys (it then chooses the number of splits); 1 on the others."""
    return 0 if torch.cuda.get_device_capability(device)[0] in (10, 11) else 1


PASSES = Passes(_forward, _backward)
run = register(NAME, _forward, _backward, _from_cache, switch=SWITCHES[-1])
