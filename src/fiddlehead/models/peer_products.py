"""Products of layers that processes share, which `peer_copies` lets them compute while their tokens travel.

Shapes: n processes of a group, each with t tokens; C to D features. A whole tensor, (n t, ...), has one process's part
after another's. The first dimension is that of the processes; others may follow before the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fiddlehead.models.peer_copies import connected, rows


def product_of_whole(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    """The product of all processes' x, (t, ..., C), with weight, (D, C): (n t, ..., D)."""
    return _product_of_whole_op(x.contiguous(), weight, group, size)


def gradients_of_whole(
    x: Tensor, weight: Tensor, grad: Tensor, group: str, size: int, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `product_of_whole` with respect to x and weight, if they are asked for.

    Args:
        grad: (n t, ..., D).
    """
    found = _gradients_of_whole_op(x.contiguous(), weight, grad.contiguous(), group, size, of_x, of_weight)
    return end_sum(*found[:2]) if of_x else None, found[2] if of_weight else None


def sum_of_products(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    """The sum of all processes' products of x, (n t, ..., C), with weight, (D, C), for the own tokens: (t, ..., D)."""
    return end_sum(*_sum_of_products_op(x.contiguous(), weight, group, size))


def gradients_of_sum(
    x: Tensor, weight: Tensor, grad: Tensor, group: str, size: int, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `sum_of_products` with respect to x and weight, if they are asked for.

    Args:
        grad: (t, ..., D), of this process's tokens.
    """
    found = _gradients_of_sum_op(x.contiguous(), weight, grad.contiguous(), group, size, of_x, of_weight)
    return found[0] if of_x else None, found[1] if of_weight else None


def end_sum(own: Tensor, others: Tensor) -> Tensor:
    """The sum of what `Peers.start_sum` gives. No part of an operator: the compiler adds in its next kernel."""
    return own + torch.ops._c10d_functional.wait_tensor(others)


# Operators, because the compiler cannot look into copies on other streams, and would start them later than it could.


def _product_of_whole(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    y = _shape_of_product(x, weight, group, size)
    parts = y.chunk(size)
    connected(group).gather_while(x, lambda each, own: torch.mm(rows(own), weight.T, out=rows(parts[each])))
    return y


def _gradients_of_whole(
    x: Tensor, weight: Tensor, grad: Tensor, group: str, size: int, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    peers = connected(group)
    gathering = peers.gather(x) if of_weight else None
    own, others = peers.start_sum(grad, weight) if of_x else (x.new_empty(0), x.new_empty(0))
    return own, others, weight.new_empty(0) if gathering is None else rows(grad).T @ rows(gathering.end())


def _sum_of_products(x: Tensor, weight: Tensor, group: str, size: int) -> tuple[Tensor, Tensor]:
    return connected(group).start_sum(x, weight.T)


def _gradients_of_sum(
    x: Tensor, weight: Tensor, grad: Tensor, group: str, size: int, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    peers, grad_x = connected(group), torch.empty_like(x) if of_x else x.new_empty(0)
    parts = grad_x.chunk(size)

    def compute(each: int, own: Tensor) -> None:
        if of_x:
            torch.mm(rows(own), weight, out=rows(parts[each]))

    whole = peers.gather_while(grad, compute, keep=of_weight)
    return grad_x, rows(whole).T @ rows(x) if of_weight else weight.new_empty(0)


def _shape_of_product(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(size * x.shape[0], *x.shape[1:-1], weight.shape[0])


def _shapes_of_sum(x: Tensor, weight: Tensor, group: str, size: int) -> tuple[Tensor, Tensor]:
    own = x.new_empty(x.shape[0] // size, *x.shape[1:-1], weight.shape[0])
    return own, torch.empty_like(own)


def _shapes_of_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, group: str, size: int, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if of_x else 0), weight.new_empty(weight.shape if of_weight else 0)


_product_of_whole_op = torch.library.custom_op("fiddlehead::peer_product", _product_of_whole, mutates_args=())
_product_of_whole_op.register_fake(_shape_of_product)
_gradients_of_whole_op = torch.library.custom_op("fiddlehead::peer_gradients", _gradients_of_whole, mutates_args=())
_sum_of_products_op = torch.library.custom_op("fiddlehead::peer_sum", _sum_of_products, mutates_args=())
_sum_of_products_op.register_fake(_shapes_of_sum)
_gradients_of_sum_op = torch.library.custom_op("fiddlehead::peer_sum_gradients", _gradients_of_sum, mutates_args=())
_gradients_of_sum_op.register_fake(_shapes_of_gradients)


@_gradients_of_whole_op.register_fake
def _(
    x: Tensor, weight: Tensor, grad: Tensor, group: str, size: int, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_own, of_weights = _shapes_of_gradients(x, weight, grad, group, size, of_x, of_weight)
    return of_own, torch.empty_like(of_own), of_weights
