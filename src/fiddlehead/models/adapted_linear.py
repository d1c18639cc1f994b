"""The product of a frozen weight with an adapter, where large tensors are read and written as rarely as possible."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fiddlehead.models.linear import summed
from fiddlehead.models.nf4 import dequantize, is_quantized, nf4_product


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`x W^T + bias + x a^T b^T`: (..., in) to (..., out), in the dtype of x.

    The adapter's part is computed first, and the large product is added to it in one kernel. Written as a sum of two
    products it takes three more passes over the output, and as many over the gradient of the input.

    Args:
        weight: (out, in), or what `nf4.quantize` made of it; like `bias`, it gets no gradient.
        a: (rank, in). It may be wider than x, as its gradient then is, too: such a sum over all tokens is not rounded.
        b: (out, rank), like a.
    """
    return _AdaptedLinear.apply(x.flatten(0, -2), weight, bias, a, b).view(*x.shape[:-1], b.shape[0])


class _AdaptedLinear(torch.autograd.Function):
    """Keeps its inputs, and the adapter's `rank` values of each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        z = F.linear(x, a)
        ctx.save_for_backward(x, weight, a, b, z)
        return added(x, weight, z, b, bias, True)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight, a, b, z) = grad_outputs, ctx.saved_tensors
        learns_x, _, _, learns_a, learns_b = ctx.needs_input_grad
        of_a, of_b = ctx.dtypes
        dx = da = None
        if learns_x or learns_a:
            dz = dy @ b
            dx = added(dy, weight, dz, a, None, False) if learns_x else None
            da = summed(dz.T, x, of_a) if learns_a else None
        return dx, None, None, da, summed(dy.T, z, of_b) if learns_b else None


def product(x: Tensor, weight: Tensor, features: int, transposed: bool) -> Tensor:
    """`x W`, (N, in) to (N, features); `transposed`: with the transposed W, which may be in NF4."""
    if is_quantized(weight):
        return nf4_product(x, weight, features, transposed)
    weight = weight.to(x.dtype)
    return x @ (weight.T if transposed else weight)


def added(x: Tensor, weight: Tensor, z: Tensor, small: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`x W + z small + bias`, (N, in) to (N, out); `transposed`: with the transposed W, and the transposed `small`."""
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
