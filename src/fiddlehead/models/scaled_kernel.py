"""A Triton kernel for the product of a large tensor and a factor on the device, which leaves at once if that is 1."""

# PyTorch brings Triton only in its builds for GPUs, and a type checker cannot check kernels.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, PROGRAMS, WARPS = 4096, 2048, 8
"""Numbers that a program multiplies at once, the most programs, and the warps of each."""


def multiply_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """As `scaled.multiply_`, on a GPU."""
    assert x.is_contiguous()
    blocks = triton.cdiv(x.numel(), BLOCK)
    if blocks:
        programs = min(blocks, PROGRAMS)
        _multiply[(programs,)](x, factor, x.numel(), triton.cdiv(blocks, programs), BLOCK=BLOCK, num_warps=WARPS)
        torch.autograd.graph.increment_version(x)
    return x


@triton.jit
def _multiply(x, factor, numbers, turns, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1:
        for turn in range(turns):
            block = (turn * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
            places = block * BLOCK + tl.arange(0, BLOCK)
            inside = places < numbers
            values = tl.load(x + places, mask=inside)
            tl.store(x + places, (values.to(by.dtype) * by).to(x.dtype.element_ty), mask=inside)
