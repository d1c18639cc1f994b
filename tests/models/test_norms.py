"""RMSNorm and its gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fiddlehead.models.norms import RMSNorm, ZeroCenteredRMSNorm

EPS = 1e-5


def exact(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * factor


@pytest.mark.parametrize("kind", [RMSNorm, ZeroCenteredRMSNorm])
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 4, 3, 32), (7, 1), (1, 9), (5000, 16), (0, 8)])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-4, 0.0), (1e3, 1e3)])
def test_output_and_gradients_are_those_of_float64(
    kind: type[RMSNorm | ZeroCenteredRMSNorm], shape: tuple[int, ...], scale: float, offset: float
) -> None:
    torch.manual_seed(0)
    norm = kind(shape[-1], eps=EPS)
    nn.init.normal_(norm.weight)
    x = (torch.randn(shape) * scale + offset).requires_grad_()
    grad = torch.randn(shape)
    y = norm(x)
    found = [y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad)]

    wide_x, wide_weight = (value.detach().double().requires_grad_() for value in (x, norm.weight))
    wide = exact(wide_x, wide_weight if kind is RMSNorm else 1 + wide_weight)
    expected = [wide.detach(), *torch.autograd.grad(wide, (wide_x, wide_weight), grad.double())]
    factor = 1 / (wide_x.detach().square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    along = (grad.double() * (wide_weight.detach() if kind is RMSNorm else 1 + wide_weight.detach()) * factor).norm()
    # The gradient of x is a difference: of one channel, or of a length far above eps, hardly anything is left of it.
    sizes = [wide.detach().norm(), along, expected[2].norm()]
    for value, right, size in zip(found, expected, sizes, strict=True):
        assert float((value - right).norm()) <= 1e-6 * float(size)


@pytest.mark.parametrize("kind", [RMSNorm, ZeroCenteredRMSNorm])
def test_a_view_and_another_layout_have_the_same_gradients(kind: type[RMSNorm | ZeroCenteredRMSNorm]) -> None:
    torch.manual_seed(0)
    norm = kind(16, eps=EPS)
    nn.init.normal_(norm.weight)
    whole = torch.randn(6, 5, 40, requires_grad=True)
    outer = torch.randn(5, 16, 6)
    for grad in (outer.permute(2, 0, 1), outer.permute(2, 0, 1).contiguous(), torch.ones(()).expand(6, 5, 16)):
        (found,) = torch.autograd.grad(norm(whole[..., 8:24]), whole, grad)
        part = whole.detach()[..., 8:24].contiguous().requires_grad_()
        (expected,) = torch.autograd.grad(norm(part), part, grad.contiguous())
        torch.testing.assert_close(found[..., 8:24], expected, rtol=1e-6, atol=1e-6)
        assert not found[..., :8].any()
        assert not found[..., 24:].any()


@pytest.mark.parametrize("learns", ["x", "weight"])
def test_what_is_frozen_has_no_gradient(learns: str) -> None:
    norm, x = RMSNorm(8, eps=EPS), torch.randn(3, 8)
    norm.weight.requires_grad_(learns == "weight")
    x.requires_grad_(learns == "x")
    norm(x).sum().backward()
    assert (x.grad is None) == (learns != "x")
    assert (norm.weight.grad is None) == (learns != "weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(24, eps=EPS).to(dtype), torch.randn(4, 24, dtype=dtype, requires_grad=True)
    y = norm(x)
    y.backward(torch.randn_like(y))
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    error = (y.double() - exact(x.detach().double(), norm.weight.detach().double())).abs().max()
    assert float(error.detach()) < 4 * torch.finfo(dtype).eps * 4


def test_a_narrow_stream_keeps_its_dtype_beside_wide_weights_and_under_autocast() -> None:
    norm = RMSNorm(24, eps=EPS)
    x = torch.randn(4, 24, dtype=torch.bfloat16, requires_grad=True)
    plain = norm(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = norm(x)
    assert plain.dtype == cast.dtype == torch.bfloat16
    torch.testing.assert_close(plain, cast)
    plain.sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32
