"""Triton kernels of a decoding step: sequences have a few new tokens, so that all time is spent on reading weights.

A step's kernels depend on each other, and one alone lasts a few microseconds. On GPUs from Hopper on a kernel therefore
starts while the one before it still runs, reads its first weights, and then waits for that one's results (programmatic
dependent launch).

Shapes: B sequences of T new tokens, K and N channels of a product's input and output, H query heads, G key/value heads,
D head dim, R rotary channels.
"""

# Triton is not where there is no GPU, and its kernels are not Python to a type checker.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ACTIVATIONS = {"swiglu": 1, "geglu": 2}
"""The gated activations that a product can end with, and their numbers in the kernels."""


MOST_ROWS = 8
"""With more rows of x, cuBLAS multiplies."""


class Tile(NamedTuple):
    """The part of the weight that a program multiplies at once, and by how many warps."""

    rows: int
    depth: int
    warps: int


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    added: torch.Tensor | None = None,
    factor: float = 1.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """`added + factor * activation(norm(x) @ weight.T * scale + bias)`, (B, N), in x's dtype; sums are in float32.

    Args:
        x: (B, K), contiguous.
        weight: (N, K), contiguous, in x's dtype or int8; with an activation (2 N, K), the gate's rows first.
        gain: (K,), of an RMSNorm of x; None: x is not normalized.
        eps: of the norm.
        scale: of each row of the weight, float32.
        bias: of each row of the weight.
        activation: a name in `ACTIVATIONS`.
        added: (B, N).
        tile: None: one that was fast on an H100.
    """
    B, K = x.shape
    if B > MOST_ROWS:
        return _product_by_library(x, weight, gain, eps, scale, bias, activation, added, factor)
    N = weight.shape[0] // (1 if activation is None else 2)
    out = torch.empty(B, N, dtype=x.dtype, device=x.device)
    rows, depth, warps = tile or _tile(B, N, K, activation is not None, weight.dtype)
    options = {
        "K": K,
        "ROWS": rows,
        "DEPTH": min(depth, triton.next_power_of_2(K)),
        "NORMED": gain is not None,
        "GATED": 0 if activation is None else ACTIVATIONS[activation],
        "SCALED": scale is not None,
        "BIASED": bias is not None,
        "ADDED": added is not None,
        "num_warps": warps,
        **_early(x.device),
    }
    kernel = _product_of_one
    if B > 1:
        kernel = _product_of_some
        options |= {"BATCH": B, "PADDED": triton.next_power_of_2(B)}
    kernel[(triton.cdiv(N, rows),)](x, gain, weight, scale, bias, added, out, N, eps, factor, **options)
    return out


def _tile(B: int, N: int, K: int, gated: bool, dtype: torch.dtype) -> Tile:
    """Measured with the shapes of Llama 3.2 1B on an H100."""
    if B > 1:
        return Tile(4, 1024, 4)
    if dtype == torch.int8:
        return Tile(2 if gated else 4, 2048, 4)
    if K > 4096:
        return Tile(1, 4096, 4) if K % 4096 == 0 else Tile(2, 2048, 4)
    if gated:
        return Tile(8, 1024, 4)
    return Tile(4, 1024, 4) if N > K else Tile(2, 2048, 4)


def _product_by_library(
    x: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    added: torch.Tensor | None,
    factor: float,
) -> torch.Tensor:
    """`product` with cuBLAS, and kernels for what is before and after."""
    if gain is not None:
        B, K = x.shape
        x, before = torch.empty_like(x), x
        _norm[(B,)](before, gain, x, eps, K=K, BLOCK=triton.next_power_of_2(K), **_early(x.device))
    if added is not None and scale is None and bias is None and activation is None:
        return torch.addmm(added, x, weight.T, alpha=factor)
    y = F.linear(x, weight.to(x.dtype), bias if scale is None else None)
    if scale is not None:
        y = y * scale.to(y.dtype)
        y = y if bias is None else y + bias
    if activation is not None:
        B, N = y.shape[0], y.shape[1] // 2
        y, before = torch.empty(B, N, dtype=y.dtype, device=y.device), y
        grid = (B, triton.cdiv(N, 1024))
        _activate[grid](before, y, N, GATED=ACTIVATIONS[activation], BLOCK=1024, **_early(y.device))
    y = y if factor == 1.0 else y * factor
    return y if added is None else y + added


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
    early = _early(k.device)
    out = torch.empty(B * T, heads * D, dtype=qkv.dtype, device=k.device)
    parts = sums = out
    if count > 1:
        parts = torch.empty(B * T, heads, count, D, dtype=torch.float32, device=k.device)
        sums = torch.empty(2, B * T, heads, count, dtype=torch.float32, device=k.device)
    cos, sin = (None, None) if rope is None else rope
    q_gain, k_gain = (None, None) if gains is None else gains
    shared = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "SPLITS": count, **early}
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


def _early(device: torch.device) -> dict[str, bool]:
    """The options of a kernel that may start before the one in front of it has ended."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def _gated(gate, up, GATED: tl.constexpr):
    """The activation of the gate, times the other half."""
    if GATED == 1:
        active = gate * tl.sigmoid(gate)
    else:  # GELU in its tanh form; tanh(z) = 2 sigmoid(2 z) - 1
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return active * up


@triton.jit
def _finish(y, up, rows, bias, scale, N, GATED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """Sums of a product, with the rows in the first dimension of as many as `rows` has, to its result."""
    if SCALED:
        y *= tl.load(scale + rows)
        if GATED > 0:
            up *= tl.load(scale + rows + N)
    if BIASED:
        y += tl.load(bias + rows).to(tl.float32)
        if GATED > 0:
            up += tl.load(bias + rows + N).to(tl.float32)
    if GATED > 0:
        y = _gated(y, up, GATED)
    return y


@triton.jit
def _norm(x, gain, out, eps, K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """RMSNorm of a row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    k = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * K + k, k < K, 0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / K + eps) * tl.load(gain + k, k < K, 0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * K + k, value.to(out.dtype.element_ty), k < K)


@triton.jit
def _activate(x, out, N, GATED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """A row's gate and the other half, (2 N,), to (N,)."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = x + tl.program_id(0) * 2 * N
    gate = tl.load(row + n, n < N, 0.0).to(tl.float32)
    up = tl.load(row + N + n, n < N, 0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * N + n, _gated(gate, up, GATED).to(out.dtype.element_ty), n < N)


@triton.jit
def _read(pointers, inside, MASKED: tl.constexpr, eviction: tl.constexpr):
    """Values in float32, zero where not inside; without a mask the compiler reads more of them at once."""
    if MASKED:
        value = tl.load(pointers, inside, 0.0, eviction_policy=eviction)
    else:
        value = tl.load(pointers, eviction_policy=eviction)
    return value.to(tl.float32)


@triton.jit
def _product_of_one(
    x, gain, weight, scale, bias, added, out, N, eps, factor,
    K: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`product` for B = 1: a program has `ROWS` rows of the weight."""
    if EARLY:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(rows, N - 1)  # a row beyond the last reads the last one, and is not written
    weights = weight + read.to(tl.int64)[:, None] * K
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros([ROWS, DEPTH], tl.float32)
    ups = tl.zeros([ROWS, DEPTH], tl.float32)
    squares = tl.zeros([DEPTH], tl.float32)
    for start in tl.static_range(0, K, DEPTH):
        k = start + depth
        w = _read(weights + k[None, :], (k < K)[None, :], K % DEPTH != 0, "evict_first")
        if GATED > 0:
            u = _read(weights + N.to(tl.int64) * K + k[None, :], (k < K)[None, :], K % DEPTH != 0, "evict_first")
        if EARLY and start == 0:
            gdc_wait()  # weights are there from the beginning, x is not
        value = _read(x + k, k < K, K % DEPTH != 0, "evict_last")
        if NORMED:
            squares += value * value
            value *= _read(gain + k, k < K, K % DEPTH != 0, "evict_last")
        sums += w * value[None, :]
        if GATED > 0:
            ups += u * value[None, :]
    y = tl.sum(sums, 1)
    up = tl.sum(ups, 1)
    if NORMED:
        root = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y *= root
        up *= root
    y = _finish(y, up, read, bias, scale, N, GATED, SCALED, BIASED) * factor
    if ADDED:
        y += tl.load(added + read).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), rows < N)


@triton.jit
def _product_of_some(
    x, gain, weight, scale, bias, added, out, N, eps, factor,
    K: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
    BATCH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """`product` for a few rows of x: a program has `ROWS` rows of the weight, and reads them once."""
    if EARLY:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(rows, N - 1)
    weights = weight + read.to(tl.int64)[:, None] * K
    batch = tl.arange(0, PADDED)
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    ups = tl.zeros([ROWS, PADDED], tl.float32)
    squares = tl.zeros([PADDED], tl.float32)
    if EARLY:
        gdc_wait()
    for start in range(0, K, DEPTH):
        k = start + depth
        w = _read(weights + k[None, :], (k < K)[None, :], K % DEPTH != 0, "evict_first")
        if GATED > 0:
            u = _read(weights + N.to(tl.int64) * K + k[None, :], (k < K)[None, :], K % DEPTH != 0, "evict_first")
        if NORMED:
            gains = _read(gain + k, k < K, K % DEPTH != 0, "evict_last")
        for b in tl.static_range(BATCH):
            value = _read(x + b * K + k, k < K, K % DEPTH != 0, "evict_last")
            if NORMED:
                squares += tl.where(batch == b, tl.sum(value * value, 0), 0.0)
                value *= gains
            here = (batch == b)[None, :]
            sums += tl.where(here, tl.sum(w * value[None, :], 1)[:, None], 0.0)
            if GATED > 0:
                ups += tl.where(here, tl.sum(u * value[None, :], 1)[:, None], 0.0)
    if NORMED:
        root = tl.rsqrt(squares / K + eps)[None, :]
        sums *= root
        ups *= root
    y = _finish(sums, ups, read[:, None], bias, scale, N, GATED, SCALED, BIASED) * factor
    place = batch[None, :] * N + rows[:, None]
    mask = (batch < BATCH)[None, :] & (rows < N)[:, None]
    if ADDED:
        y += tl.load(added + place, mask, 0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask)


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
