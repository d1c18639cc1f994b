"""Linear layers with either library."""

from __future__ import annotations

import pytest
import torch

from fiddlehead.models.linear import Linear, linear


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (8, 1), (64,), (65,), (2, 3), (0,)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_product_for_few_rows_and_many(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(33, 21, dtype=dtype), torch.randn(33, dtype=dtype) if biased else None
    x = torch.randn(*shape, 42, dtype=dtype)[..., ::2]  # with gaps
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == (*shape, 33)
    limit = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=limit, rtol=limit)


def test_it_has_gradients_and_follows_autocast() -> None:
    layer, x = Linear(4, 3), torch.randn(2, 4)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(dim=0).expand(3, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.device("meta"), torch.no_grad():
        assert Linear(4, 3)(torch.empty(2, 4)).shape == (2, 3)
