"""The layers' weights in bfloat16 during a forward pass, whose gradients are then bfloat16, too.

Autocast makes the same copies, and their gradients float32: for each weight it reads 2 bytes and writes 4, which the
norm and the optimizer then read, or a sum over micro-batches. The values are those of bfloat16 all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fiddlehead.models.linear import Linear
from fiddlehead.models.moe import GroupedLinear
from fiddlehead.models.transformer import Transformer


def of_products(transformer: Transformer) -> list[nn.Module]:
    """The modules of the layers that use their trained weight in one matrix product, and nowhere else."""
    layers: Any = transformer.layers
    found = [module for layer in layers for module in layer.modules()]
    return [module for module in found if type(module) in _PRODUCTS and _weight(module).requires_grad]


@contextmanager
def in_bfloat16(transformer: Transformer, *, adds_up: bool = False) -> Iterator[None]:
    """In the block, `of_products` have bfloat16 copies of their float32 weights; the gradients will be bfloat16.

    A weight that the block uses twice would add up its gradients in bfloat16, and round.

    Args:
        adds_up: several backward passes add up a gradient: it will be float32, to which bfloat16 ones are added.
            Otherwise the second pass would add in bfloat16.
    """
    weights = [(module, _weight(module)) for module in of_products(transformer)]
    try:
        for module, weight in weights:
            weight.grad_dtype = None  # any: it is float32 after other forward passes
            module._parameters["weight"] = _InBFloat16.apply(weight, adds_up)
        yield
    finally:
        for module, weight in weights:
            module._parameters["weight"] = weight


class _InBFloat16(torch.autograd.Function):
    """A cast whose gradient is not cast back.

    It is outside of what the compiler sees: there a gradient has the dtype of its tensor.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, adds_up: bool) -> torch.Tensor:
        ctx.weight = weight if adds_up else None
        return weight.to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,), weight = grads, ctx.weight
        first = weight is not None and weight.grad is None
        return gradient.float() if first else gradient, None


_PRODUCTS = (Linear, nn.Linear, GroupedLinear)


def _weight(module: Any) -> nn.Parameter:
    return module.weight
