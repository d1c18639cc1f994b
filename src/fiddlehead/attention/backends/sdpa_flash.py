"""PyTorch's own build of flash-attention: version 2 on GPUs, a tiled kernel on CPUs.

Both support grouped heads. On a GPU, memory is linear in the sequence length. The CPU's kernel supports only the square
causal mask: windows, padding, caches and ALiBi become a mask, quadratic in the sequence length. It runs packed
sequences one after another (under torch.compile with a mask, quadratic in their total length).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fiddlehead.attention.backends.backend import Extras, Passes, generation
from fiddlehead.attention.backends.masks import alibi_bias, gathered, visible
from fiddlehead.attention.backends.sdpa import HALF, dtype_name, first, outside
from fiddlehead.attention.spec import AttentionSpec, Target

NAME = "sdpa_flash"
PLACE = 50
SWITCHES: tuple[str, ...] = ("NVTE_FLASH_ATTN",)


def place(spec: AttentionSpec, target: Target) -> float | None:
    """First on a CPU; on Ampere second, after flash-attn 2, of which it is a copy."""
    return {"older": None, "ampere": 35}.get(generation(spec, target), PLACE)


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The rules are those of PyTorch's sdp_utils.cpp and its copy of flash-attention 2, in 2.11 to 2.13."""
    if target.device_type == "cpu":
        return first(
            [
                (not spec.dtype.is_floating_point, f"needs a floating-point dtype, not {dtype_name(spec)}"),
                (spec.softcap, "softcap: PyTorch's flash-attention has none"),
                (spec.sinks, "sinks: PyTorch's flash-attention has none"),
                (spec.dropout, "dropout: its CPU kernel has none"),
                (spec.by_passes, "pass by pass: only its GPU kernel has both passes"),
            ]
        )
    # The backward pass of head dims above 192 needs more shared memory than these have; it was made for 256 alone.
    small = 86 <= target.sm <= 89 or target.sm >= 120
    without_backward = spec.head_dim > 192 and (spec.head_dim <= 224 or spec.dropout > 0)
    return first(
        [
            outside(target, 80, 121),
            (spec.dtype not in HALF, f"{dtype_name(spec)}: only float16 and bfloat16"),
            (spec.head_dim % 8, f"head_dim={spec.head_dim}: only multiples of 8"),
            (spec.head_dim > 256, f"head_dim={spec.head_dim}: at most 256"),
            (
                spec.training and small and without_backward,
                f"head_dim={spec.head_dim}: no gradients on sm{target.sm} above 192, but for 256 without dropout",
            ),
            (spec.softcap, "softcap: PyTorch's flash-attention has none"),
            (spec.alibi, "alibi: PyTorch builds flash-attention without it"),
            (spec.sinks, "sinks: PyTorch's flash-attention has none"),
            (spec.padding_mask, "padding_mask: takes none; pack the sequences instead (cu_seqlens)"),
            (spec.page_size, "paged cache: PyTorch's flash-attention 2 takes no page table"),
            (spec.cached and spec.training, "cache: has no gradients"),
            (
                spec.deterministic and spec.training and not torch.are_deterministic_algorithms_enabled(),
                "deterministic: its gradients are only under torch.use_deterministic_algorithms(True)",
            ),
        ]
    )


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend: q (B, T, H, D), k and v (B, S, G, D), or packed; returns q's shape."""
    if q.device.type == "cpu":
        if spec.packed:
            return _packed_on_cpu(q, k, v, spec, scale, extras)
        return _on_cpu(q, gathered(k, extras), gathered(v, extras), spec, scale, extras)
    return _with_cache(q, k, v, spec, scale, extras) if spec.cached else _forward(q, k, v, spec, scale, extras)[0]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, right = spec.window_size
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *_borders(q, k, spec, extras),
        spec.dropout,
        spec.causal,
        False,  # return_debug_mask
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[:3]


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    state: torch.Tensor,
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    left, right = spec.window_size
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *_borders(q, k, spec, extras),
        spec.dropout,
        spec.causal,
        torch.empty(2, dtype=torch.uint64, device=q.device),  # which a dropout would be drawn from
        torch.empty(0, dtype=torch.uint64, device=q.device),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return dq, dk, dv, None


PASSES = Passes(_forward, _backward)


def _borders(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, extras: Extras) -> tuple[object, ...]:
    if spec.packed:
        return extras.cu_seqlens_q, extras.cu_seqlens_k, extras.max_seqlen_q, extras.max_seqlen_k
    return None, None, q.shape[1], k.shape[1]


def _with_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend to the filled part of each sequence's cache, which only the packed form of the operator takes."""
    (B, T), S = q.shape[:2], k.shape[1]
    sequences = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    left, right = spec.window_size
    out = torch.ops.aten._flash_attention_forward(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        sequences * T,
        sequences * S,
        T,
        S,
        spec.dropout,
        spec.causal,
        False,  # return_debug_mask
        scale=scale,
        window_size_left=left,
        window_size_right=right,
        seqused_k=extras.cache_lengths,
    )[0]
    return out.unflatten(0, (B, T))


def _packed_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend to one sequence after another; under torch.compile, which cannot count them, to all with a mask."""
    if torch.compiler.is_compiling():
        return _on_cpu(q[None], k[None], v[None], spec, scale, extras)[0]
    assert extras.cu_seqlens_q is not None and extras.cu_seqlens_k is not None
    lengths_q, lengths_k = extras.cu_seqlens_q.diff().tolist(), extras.cu_seqlens_k.diff().tolist()
    slopes = Extras(alibi_slopes=extras.alibi_slopes)
    out = []
    # What is behind the last border is another piece, of queries that see nothing.
    *pieces_q, behind = q.split([*lengths_q, len(q) - sum(lengths_q)])
    pieces_k, pieces_v = (x.split([*lengths_k, len(x) - sum(lengths_k)])[:-1] for x in (k, v))
    for one_q, one_k, one_v in zip(pieces_q, pieces_k, pieces_v, strict=True):
        if len(one_q) and len(one_k):
            alone = replace(spec, packed=False, same_length=len(one_q) == len(one_k))
            out.append(_on_cpu(one_q[None], one_k[None], one_v[None], alone, scale, slopes)[0])
        else:
            out.append(torch.zeros_like(one_q))
    return torch.cat([*out, torch.zeros_like(behind)])


def _on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend with a leading batch dimension on every tensor."""
    T, S = q.shape[1], k.shape[1]
    square = spec.causal and spec.same_length and not (spec.packed or spec.padding_mask)
    square = square and spec.window_size == (-1, -1)
    # The kernel takes its mask in float32 also for smaller inputs.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = None
    if spec.alibi:
        bias = -alibi_bias(T, S, extras, dtype)
    mask = None if square else visible(T, S, spec, extras, q.device)
    if mask is not None:
        # A query that sees no key has only -inf here: the kernel yields zeros and zero gradients for it.
        bias = torch.zeros((), dtype=dtype, device=q.device) if bias is None else bias
        bias = torch.where(mask[:, None], bias, float("-inf"))
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        0.0,
        square,
        attn_mask=bias,
        scale=scale,
    )[0]
    return out.transpose(1, 2)
