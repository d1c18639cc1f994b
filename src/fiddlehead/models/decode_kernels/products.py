"""Products with the weights, with what is before and after them.

One row is multiplied by a kernel of ours, several are left to cuBLAS: for 8 rows a kernel with tensor cores took longer
in four of a Llama 3.2 1B's five products.
"""

# PyTorch brings Triton only in its builds for GPUs, and a type checker cannot check kernels.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fiddlehead.models.decode_kernels.launch import early

ACTIVATIONS = {"swiglu": 1, "geglu": 2}
"""The gated activations that a product can end with, and their numbers in the kernels."""


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
    if B > 1:
        return _product_by_library(x, weight, gain, eps, scale, bias, activation, added, factor)
    N = weight.shape[0] // (1 if activation is None else 2)
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    rows, depth, warps = tile or _tile(N, K, activation is not None, weight.dtype)
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
        **early(x.device),
    }
    _product_of_one[(triton.cdiv(N, rows),)](x, gain, weight, scale, bias, added, out, N, eps, factor, **options)
    return out


def _tile(N: int, K: int, gated: bool, dtype: torch.dtype) -> Tile:
    """Measured with the shapes of Llama 3.2 1B on an H100."""
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
        _norm[(B,)](before, gain, x, eps, K=K, BLOCK=triton.next_power_of_2(K), **early(x.device))
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
        _activate[grid](before, y, N, GATED=ACTIVATIONS[activation], BLOCK=1024, **early(y.device))
    y = y if factor == 1.0 else y * factor
    return y if added is None else y + added


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
