"""Linear layers. For few rows on a CPU, as in decoding, they use oneDNN, which is then faster than BLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_MOST = 64
"""Rows."""
# The operator that torch.compile takes for linear layers; F.linear itself calls BLAS for float32.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`nn.Linear` that computes with `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return linear(input, self.weight, self.bias)


def summed(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b` in `dtype`, that of a and b or float32. On a GPU float32 sums are not rounded before.

    In bfloat16, cuBLAS also rounds the sums of parts of a long dimension, as gradients of narrow matrices have it.
    """
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`; it uses oneDNN for 1 to 64 rows on a CPU in float32, without gradients (benchmarks/generate.py)."""
    if (
        torch.compiler.is_compiling()  # which has ways of its own
        or torch.is_grad_enabled()
        or not _HAS_ONEDNN
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or not 0 < x.numel() <= _MOST * x.shape[-1]
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
