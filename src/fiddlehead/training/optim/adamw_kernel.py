"""A Triton kernel for a step of AdamW that also clips: it reads and writes each tensor once."""

# PyTorch brings Triton only in its builds for GPUs, and a type checker cannot check kernels.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 1024, 4
"""Weights of a program, and its warps."""


def update_weight(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    low_bits: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of one parameter, (n,), and of its state, in place.

    Args:
        low_bits: the lower half of the weights, of which a bfloat16 parameter is the rounded value; None: the
            parameter is the weights, in float32.
        scalars: a factor on the gradient; the rate times the weight decay; the rate divided by the first moment's bias
            correction; and the root of the second's. (4,) float32, on the device.
    """
    n = parameter.numel()
    if n:
        halves = low_bits is not None
        _update[(triton.cdiv(n, BLOCK),)](
            parameter.view(torch.int16) if halves else parameter,
            gradient,
            low_bits.view(torch.int16) if low_bits is not None else parameter,
            exp_avg,
            exp_avg_sq,
            scalars,
            n,
            float(beta1),
            float(1 - beta1),
            float(beta2),
            float(1 - beta2),
            float(eps),
            HALVES=halves,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # which sums are fused depends on the size: pieces would differ from the whole
        )


@triton.jit
def _update(
    parameter,
    gradient,
    low_bits,
    exp_avg,
    exp_avg_sq,
    scalars,
    n,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    factor, decay = tl.load(scalars), tl.load(scalars + 1)
    step_size, correction = tl.load(scalars + 2), tl.load(scalars + 3)
    if HALVES:
        high = tl.load(parameter + places, mask=inside, other=0).to(tl.int32)
        low = tl.load(low_bits + places, mask=inside, other=0).to(tl.int32)
        weight = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        weight = tl.load(parameter + places, mask=inside, other=0.0)
    g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32) * factor
    first = beta1 * tl.load(exp_avg + places, mask=inside, other=0.0) + rest1 * g
    second = beta2 * tl.load(exp_avg_sq + places, mask=inside, other=0.0) + rest2 * g * g
    tl.store(exp_avg + places, first, mask=inside)
    tl.store(exp_avg_sq + places, second, mask=inside)
    weight = weight - decay * weight - step_size * first / (tl.sqrt(second) / correction + eps)
    if HALVES:
        bits = weight.to(tl.int32, bitcast=True)
        rounded = (bits + 0x8000) >> 16  # to the nearest; what is left over fits in 16 bits with a sign
        tl.store(parameter + places, rounded.to(tl.int16), mask=inside)
        tl.store(low_bits + places, (bits - (rounded << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(parameter + places, weight, mask=inside)
