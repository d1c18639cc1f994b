"""The product of a frozen weight with an adapter, in which both are added up in one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fiddlehead.models import nf4
from fiddlehead.models.adapted_linear import adapted_linear


def drawn(rows: tuple[int, ...], width: int, out: int, rank: int, dtype: torch.dtype, bias: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "x": torch.randn(*rows, width),
        "weight": torch.randn(out, width) / width**0.5,
        "bias": torch.randn(out) if bias else None,
        "a": torch.randn(rank, width) / width**0.5,
        "b": torch.randn(out, rank) / rank**0.5,
    }
    return {name: value if value is None else value.to(dtype) for name, value in made.items()}


def results(compute: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradients of x, a and b."""
    given = {name: value if value is None else value.clone() for name, value in inputs.items()}
    learned = [given[name].requires_grad_() for name in ("x", "a", "b")]
    y = compute(**given)
    dy = torch.randn(y.mT.shape, generator=torch.Generator().manual_seed(1)).mT.to(y)  # not contiguous
    return [y.detach(), *torch.autograd.grad(y, learned, dy)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("rows", "width", "out", "rank", "compiled"),
    [((1,), 3, 2, 1, False), ((3, 5), 33, 70, 7, False), ((2, 1, 4), 70, 33, 16, False), ((3, 5), 33, 70, 7, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_and_its_gradients_are_those_of_the_sum_of_both_products(
    rows: tuple[int, ...], width: int, out: int, rank: int, dtype: torch.dtype, bias: bool, compiled: bool
) -> None:
    torch.compiler.reset()
    inputs = drawn(rows, width, out, rank, dtype, bias)
    exact = {name: value if value is None else value.double() for name, value in inputs.items()}
    found = results(torch.compile(adapted_linear, fullgraph=True) if compiled else adapted_linear, inputs)
    theirs, expected = results(plain, inputs), results(plain, exact)
    for mine, other, right in zip(found, theirs, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        assert error(mine, right) < max(1.3 * error(other, right), 1e-15 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_nf4_counts_as_what_it_stands_for(dtype: torch.dtype, compiled: bool) -> None:
    inputs = drawn((2, 9), 70, 33, 4, torch.float32, bias=True)
    bits = nf4.quantize(inputs["weight"])
    inputs = {name: value.to(dtype) for name, value in inputs.items()} | {"weight": bits}
    stands_for = inputs | {"weight": nf4.dequantize(bits, (33, 70), dtype)}
    found = results(torch.compile(adapted_linear, fullgraph=True) if compiled else adapted_linear, inputs)
    torch.testing.assert_close(found, results(adapted_linear, stands_for), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("learns", ["x", "a", "b"])
def test_no_product_is_computed_for_what_does_not_learn(learns: str) -> None:
    inputs = drawn((6,), 24, 40, 2, torch.float32, bias=False)
    inputs[learns].requires_grad_()
    y = adapted_linear(**inputs)
    with Products() as backward:
        (gradient,) = torch.autograd.grad(y.sum(), inputs[learns])
    assert gradient.shape == inputs[learns].shape
    of_input = [(6, 2), (6, 24), (6, 24)]  # the adapter's values, its part of the gradient, and all of it
    assert sorted(backward.shapes) == {"x": of_input, "a": [(2, 24), (6, 2)], "b": [(40, 2)]}[learns]


def test_the_large_product_is_added_to_the_small_one_in_place() -> None:
    inputs = drawn((6,), 24, 40, 2, torch.float32, bias=True)
    for name in ("x", "a", "b"):
        inputs[name].requires_grad_()
    with Products() as both:
        adapted_linear(**inputs).sum().backward()
    assert sorted(both.in_place) == [(6, 24), (6, 40)]


class Products(TorchDispatchMode):
    """Notes the shapes of matrix products, and of those that are added to what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.in_place: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(out.shape))
            if (kwargs or {}).get("out") is args[0]:
                self.in_place.append(tuple(out.shape))
        return out
