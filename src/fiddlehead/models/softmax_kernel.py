"""A Triton kernel for the softmax of the loss: it reads the logits once, and writes their gradient over them.

A compiled function reads them twice. A program has one row, which stays in the L2 cache between its two passes.
"""

# PyTorch brings Triton only in its builds for GPUs, and a type checker cannot check kernels.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 8192, 8
"""Columns that a program reads at once, and its warps."""


def nats_and_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    divisor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear_cross_entropy.nats_and_gradient`, for bfloat16, float16 or float32; overwrites `logits`."""
    n, V = logits.shape
    nats = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        _rows[(n,)](
            logits,
            labels,
            nats,
            divisor,
            logits.stride(0),
            V,
            ignore_index,
            float(scale),
            float(softcap or 0.0),
            CAPPED=softcap is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return nats.sum(), logits


@triton.jit
def _rows(
    logits,
    labels,
    nats,
    divisor,
    stride,
    V,
    ignore_index,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    start = logits + row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        for first in range(0, V, BLOCK):
            tl.store(start + first + columns, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=first + columns < V)
        tl.store(nats + row, 0.0)
    else:
        factor = scale / tl.load(divisor)
        exists = (label >= 0) & (label < V)
        at_label = tl.load(start + label, mask=exists, other=float("nan")).to(tl.float32)
        at_label = _scaled(at_label, scale, softcap, CAPPED)
        highest = -3e38
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, V, BLOCK):
            inside = first + columns < V
            z = tl.load(start + first + columns, mask=inside, other=0.0, eviction_policy="evict_last")
            z = tl.where(inside, _scaled(z.to(tl.float32), scale, softcap, CAPPED), -float("inf"))
            before = highest
            highest = tl.maximum(highest, tl.max(z, 0))
            sums = sums * tl.exp(before - highest) + tl.exp(z - highest)
        total = highest + tl.log(tl.sum(sums, 0))
        tl.store(nats + row, total - at_label)
        # The probability of the label is close to 1 where much was learned: 1 less is worked out before it is rounded.
        below = at_label - total
        series = below * (1 + below / 2 * (1 + below / 3 * (1 + below / 4 * (1 + below / 5))))
        of_label = tl.where(below > -0.1, series, tl.exp(below) - 1)
        for first in range(0, V, BLOCK):
            inside = first + columns < V
            z = tl.load(start + first + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            z = _scaled(z.to(tl.float32), scale, softcap, CAPPED)
            gradient = tl.where(first + columns == label, of_label, tl.exp(z - total)) * factor
            if CAPPED:
                gradient *= 1 - (z / softcap) * (z / softcap)
            tl.store(start + first + columns, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _scaled(z, scale, softcap, CAPPED: tl.constexpr):
    z = z * scale
    if CAPPED:
        small = tl.exp(-2 * tl.abs(z / softcap))
        bounded = softcap * (1 - small) / (1 + small)
        z = tl.where(z < 0, -bounded, bounded)
    return z
