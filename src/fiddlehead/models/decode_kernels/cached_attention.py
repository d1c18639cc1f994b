"""Attention of new tokens to a cache, with all that is between the products before and after it."""

# PyTorch brings Triton only in its builds for GPUs, and a type checker cannot check kernels.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fiddlehead.models.decode_kernels.launch import early


def attend_to_cache(
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    heads: int,
    left: int = -1,
    gains: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    splits: int | None = None,
) -> torch.Tensor:
    """Turns the new queries and keys, writes the keys and values behind the cached ones, and attends: (B x T, H x D).

    Args:
        qkv: (B x T, (H + 2 G) x D): the query heads, the key heads and the value heads of T tokens of each sequence.
        rope: cosine and sine for each position, (max_length, R / 2) float32 each; None: nothing turns.
        k: the cached keys, (B, max_length, G, D), with room for the new ones; v: the values.
        lengths: the cached positions of each sequence, (B,) int32; they stay as they are.
        scale: the factor on scores.
        heads: H.
        left: how many earlier tokens a token sees; -1: all.
        gains: of an RMSNorm of each query head and key head before they turn, (D,) each; `eps` is the norm's.
        splits: programs that share the keys of a head; None: as many as keep an H100 busy.
    """
    B, max_length, G, D = k.shape
    T = qkv.shape[0] // B
    seen = max_length if left < 0 else min(max_length, left + T)
    parts_of_keys = min(triton.cdiv(264, B * G), triton.cdiv(seen, 64), 64) if splits is None else splits
    count = int(triton.next_power_of_2(parts_of_keys))
    launch = early(k.device)
    out = torch.empty(B * T, heads * D, dtype=qkv.dtype, device=k.device)
    parts = sums = out
    if count > 1:
        parts = torch.empty(B * T, heads, count, D, dtype=torch.float32, device=k.device)
        sums = torch.empty(2, B * T, heads, count, dtype=torch.float32, device=k.device)
    cos, sin = (None, None) if rope is None else rope
    q_gain, k_gain = (None, None) if gains is None else gains
    shared = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "SPLITS": count, **launch}
    _attend[(B * G, count)](
        qkv, cos, sin, q_gain, k_gain, k, v, lengths, out, parts, sums,
        scale * 1.4426950408889634, eps, max_length,
        T=T, H=heads, G=G, R=0 if cos is None else 2 * cos.shape[-1],
        ROWS=max(16, triton.next_power_of_2(T * heads // G)), NEW=max(16, triton.next_power_of_2(T)),
        BLOCK_S=64 if D <= 128 else 32, LEFT=left, NORMED=q_gain is not None,
        num_warps=4, num_stages=3, **shared,
    )  # fmt: skip
    if count > 1:
        rows = B * T * heads
        _merge[(rows,)](parts, sums, out, rows, **shared, num_warps=1)
    return out


@triton.jit
def _turned(
    heads, d, gain, cos, sin, position, eps, mask, D: tl.constexpr, R: tl.constexpr, NORMED: tl.constexpr
):  # fmt: skip
    """Heads, pointers (n,) with their positions (n,), normalized and turned: (n, BLOCK_D) float32."""
    half: tl.constexpr = R // 2
    pair = tl.where(d < half, d + half, tl.where(d < R, d - half, d))  # the channel that a channel turns with
    value = tl.load(heads[:, None] + d[None, :], mask, 0.0).to(tl.float32)
    other = tl.load(heads[:, None] + pair[None, :], mask, 0.0).to(tl.float32)
    if NORMED:
        dtype = heads.dtype.element_ty
        root = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        value = (value * root * tl.load(gain + d, d < D, 0.0).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
        other = (other * root * tl.load(gain + pair, d < D, 0.0).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    if R > 0:
        angle = position.to(tl.int64)[:, None] * half + tl.where(d < half, d, d - half)[None, :]
        turns = mask & (d < R)[None, :]
        c = tl.load(cos + angle, turns, 1.0)
        s = tl.load(sin + angle, turns, 0.0)
        value = value * c + other * tl.where((d < half)[None, :], -s, s)
    return value


@triton.jit
def _finite(most):
    """The greatest score, or 0 if no key was seen: infinity minus infinity would be NaN."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def _attend(
    qkv, cos, sin, q_gain, k_gain, keys, values, lengths, out, parts, sums, scale, eps, max_length,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, NEW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    LEFT: tl.constexpr, SPLITS: tl.constexpr, NORMED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program has a sequence's queries of one key/value head, and a part of the keys; the first has the new ones too.

    `scale` is that of scores times log2(e), because exponents are of 2.
    """
    if EARLY:
        gdc_launch_dependents()
    b, g, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    shared: tl.constexpr = H // G
    d, row, new = tl.arange(0, BLOCK_D), tl.arange(0, ROWS), tl.arange(0, NEW)
    t, head = row // shared, g * shared + row % shared
    dtype = keys.dtype.element_ty
    precision: tl.constexpr = "ieee" if dtype == tl.float32 else "tf32"
    if EARLY:
        gdc_wait()
    length = tl.load(lengths + b)
    own = (t < T)[:, None] & (d < D)[None, :]
    queries = qkv + (b * T + t) * ((H + 2 * G) * D) + head * D
    q = _turned(queries, d, q_gain, cos, sin, length + t, eps, own, D, R, NORMED).to(dtype)
    is_new = (new < T)[:, None] & (d < D)[None, :]
    keys_of_new = qkv + (b * T + new) * ((H + 2 * G) * D) + (H + g) * D
    new_v = tl.load(keys_of_new[:, None] + G * D + d[None, :], is_new, 0.0).to(dtype)
    new_k = _turned(keys_of_new, d, k_gain, cos, sin, length + new, eps, is_new, D, R, NORMED).to(dtype)
    cached = b.to(tl.int64) * max_length * G * D + g * D
    mine = split == 0
    end_of_cache = cached + (length + new).to(tl.int64)[:, None] * (G * D) + d[None, :]
    writes = is_new & mine & (length + new < max_length)[:, None]
    tl.store(keys + end_of_cache, new_k, writes)
    tl.store(values + end_of_cache, new_v, writes)

    new_scores = tl.dot(q, tl.trans(new_k), input_precision=precision) * scale
    is_seen = (new[None, :] <= t[:, None]) & mine
    if LEFT >= 0:
        is_seen &= new[None, :] >= t[:, None] - LEFT
    new_scores = tl.where(is_seen, new_scores, float("-inf"))
    most = tl.max(new_scores, 1)
    new_weights = tl.exp2(new_scores - _finite(most)[:, None])
    total = tl.sum(new_weights, 1)
    result = tl.dot(new_weights.to(dtype), new_v, input_precision=precision)
    first = 0
    if LEFT >= 0:
        first = tl.maximum(length - LEFT, 0)
    part = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_S) * BLOCK_S
    begin = first + split * part
    end = tl.minimum(begin + part, length)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        place = cached + s.to(tl.int64)[:, None] * (G * D) + d[None, :]
        inside = (s < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys + place, inside, 0.0)
        v = tl.load(values + place, inside, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        seen = (s < end)[None, :]
        if LEFT >= 0:
            seen = seen & (s[None, :] >= length + t[:, None] - LEFT)
        scores = tl.where(seen, scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - _finite(more))
        weights = tl.exp2(scores - _finite(more)[:, None])
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(dtype), v, result * shrink[:, None], input_precision=precision)
        most = more
    result_of = ((b * T + t) * H + head).to(tl.int64)
    if SPLITS == 1:
        tl.store(out + result_of[:, None] * D + d[None, :], (result / total[:, None]).to(out.dtype.element_ty), own)
    else:
        part_of = result_of * SPLITS + split
        count = tl.num_programs(0).to(tl.int64) * T * shared * SPLITS
        tl.store(parts + part_of[:, None] * D + d[None, :], result, own)
        tl.store(sums + part_of, most, t < T)
        tl.store(sums + count + part_of, total, t < T)


@triton.jit
def _merge(
    parts, sums, out, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """The results of the parts of the keys to the result for all of them, of one head of one sequence."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    most = tl.load(sums + row * SPLITS + split)
    total = tl.load(sums + (rows + row) * SPLITS + split)
    weight = tl.exp2(most - tl.max(most, 0))
    part = tl.load(parts + (row * SPLITS + split)[:, None] * D + d[None, :], (d < D)[None, :], 0.0)
    result = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), d < D)
