"""The product of a frozen weight with an adapter, where large tensors are read and written as rarely as possible."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fiddlehead.models.nf4 import dequantize, is_quantized


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`x W^T + bias + x a^T b^T`: (..., in) to (..., out), in the dtype of x.

    The adapter's part is computed first, and the large product is added to it in one kernel. Written as a sum of two
    products it takes three more passes over the output, and as many over the gradient of the input.

    Args:
        weight: (out, in), or what `nf4.quantize` made of it; like `bias`, it gets no gradient.
        a: (rank, in), in the dtype of x.
        b: (out, rank), in the dtype of x.
    """
    return _AdaptedLinear.apply(x.flatten(0, -2), weight, bias, a, b).view(*x.shape[:-1], b.shape[0])


class _AdaptedLinear(torch.autograd.Function):
    """Keeps its inputs, and the adapter's `rank` values of each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        z = F.linear(x, a)
        ctx.save_for_backward(x, weight, a, b, z)
        return _added(x, weight, z, b, bias, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight, a, b, z) = grad_outputs, ctx.saved_tensors
        learns_x, _, _, learns_a, learns_b = ctx.needs_input_grad
        dz = dy @ b if learns_x or learns_a else None
        dx = _added(dy, weight, dz, a, None, False) if learns_x else None
        return dx, None, None, dz.T @ x if learns_a else None, dy.T @ z if learns_b else None


def _added(x: Tensor, weight: Tensor, z: Tensor, small: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`x W + z small + bias`; `transposed`: with the transposed W and `small`."""
    function = _added_op if torch.compiler.is_compiling() else _add
    return function(x, weight, z, small, bias, transposed, torch.compiler.is_compiling())


def _add(
    x: Tensor, weight: Tensor, z: Tensor, small: Tensor, bias: Tensor | None, transposed: bool, compiled: bool
) -> Tensor:
    small = small.T if transposed else small
    if is_quantized(weight):
        shape = (small.shape[1], x.shape[1]) if transposed else (x.shape[1], small.shape[1])
        weight = dequantize(weight, shape, x.dtype, compiled=compiled)
    total = z @ small if bias is None else torch.addmm(bias.to(x.dtype), z, small)
    weight = weight.to(x.dtype)
    return torch.addmm(total, x, weight.T if transposed else weight, out=total)


# An operator, because the compiler copies what is added to a product before it computes it.
_added_op = torch.library.custom_op("fiddlehead::adapted_linear", _add, mutates_args=())


@_added_op.register_fake
def _(
    x: Tensor, weight: Tensor, z: Tensor, small: Tensor, bias: Tensor | None, transposed: bool, compiled: bool
) -> Tensor:
    return x.new_empty(x.shape[0], small.shape[0 if transposed else 1])
