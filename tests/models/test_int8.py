"""Weights in 8 bits, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fiddlehead.errors import ConfigError
from fiddlehead.inference.generation import sample
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.int8 import Int8Linear, to_int8

SIZES = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 23, "init_method_std": 0.3}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_is_as_near_as_the_rounding_of_the_weights(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(70, 33, bias=bias, dtype=dtype)
    layer.weight.data[3] = 0
    layer.weight.data[5, 7] = 4.0
    made, x = Int8Linear(layer), torch.randn(2, 9, 70).to(dtype)
    assert made.weight.dtype == torch.int8 and made.weight.abs().max() == 127
    stands_for = made.weight.double() * made.scale.double()[:, None]
    step = layer.weight.double().abs().amax(dim=1) / 127
    assert ((stands_for - layer.weight.double()).abs() <= step[:, None] * 0.501).all()
    with torch.no_grad():
        found, expected = made(x).double(), layer.double()(x.double())
    rounding = 1e-5 if dtype == torch.float32 else 0.03
    assert ((found - expected).abs() <= x.double().abs().sum(-1, keepdim=True) * step * 0.501 + rounding).all()


def test_a_model_writes_with_the_weights_that_its_own_stand_for() -> None:
    torch.manual_seed(0)
    model, plain = (Transformer(TransformerConfig(**SIZES, add_bias_linear=True)).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    to_int8(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(layers) == 4
    for name, layer in layers.items():
        plain.get_submodule(name).weight.data = layer.weight * layer.scale[:, None]  # type: ignore[union-attr]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-5, atol=1e-5)
    assert list(sample(model, [3, 1], 6, temperature=0)) == list(sample(plain, [3, 1], 6, temperature=0))


def test_a_mixture_is_refused() -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**SIZES, num_moe_experts=2))
    with pytest.raises(ConfigError, match="weights='int8': the experts"):
        to_int8(model)
