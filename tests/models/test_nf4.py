"""NF4 against its definition in the paper, in float64, and against the weights that it stands for."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig, nf4
from fiddlehead.models.lora import LoRA, LoRALinear, merge

SHAPES = [(1, 1), (7, 9), (64, 33), (70, 300), (3, 64)]


def weight(shape: tuple[int, ...]) -> torch.Tensor:
    """Normal, with an outlier and a block of zeros."""
    drawn = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if drawn.numel() > 300:
        drawn.view(-1)[70] = 0.3
        drawn.view(-1)[128:192] = 0
    return drawn


def quantiles() -> list[float]:
    """The levels by section 3 of the paper: quantiles of a normal distribution, 7 below zero, zero, and 8 above."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    return sorted(value / above[0] for value in [*above, 0.0, *below])


def expected(weight: torch.Tensor) -> np.ndarray:
    """What a weight becomes, worked out in float64, one block at a time."""
    levels, flat = np.array(nf4.LEVELS), weight.double().numpy().ravel()
    blocks = [flat[start : start + 64] for start in range(0, len(flat), 64)]
    scales = np.array([np.abs(block).max() for block in blocks])
    rest, rounded = scales - scales.mean(), np.empty_like(scales)
    for start in range(0, len(rest), 256):
        part = slice(start, start + 256)
        step = np.abs(rest[part]).max() / 127
        rounded[part] = scales.mean() + (np.rint(rest[part] / step) * step if step else 0)
    found = []
    for block, scale, kept in zip(blocks, scales, rounded, strict=True):
        nearest = np.abs(block[:, None] / (scale or 1) - levels).argmin(axis=1)
        found.append(levels[nearest] * kept)
    return np.concatenate(found).reshape(weight.shape)


def test_the_levels_are_the_paper_s_quantiles_of_a_normal_distribution() -> None:
    assert list(nf4.LEVELS) == pytest.approx(quantiles(), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_becomes_what_the_definition_says(shape: tuple[int, ...]) -> None:
    given = weight(shape)
    bits = nf4.quantize(given)
    torch.testing.assert_close(
        nf4.dequantize(bits, shape, torch.float32).double().numpy(), expected(given), rtol=2e-6, atol=1e-9
    )
    assert torch.equal(
        nf4.dequantize(bits, shape, torch.bfloat16), nf4.dequantize(bits, shape, torch.float32).bfloat16()
    )
    assert nf4.quantize(given.to("meta")).shape == bits.shape


def test_a_weight_takes_4_13_bits() -> None:
    bits = nf4.quantize(weight((1024, 512)))
    assert 16 * bits.numel() / (1024 * 512) == pytest.approx(nf4.BITS, rel=1e-3) and f"{nf4.BITS:.2f}" == "4.13"


def layers(lora: LoRA | None, bias: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A layer of 70 to 33 features in NF4, with or without adapters, and one with the weights that it stands for."""
    linear = nn.Linear(70, 33, bias=bias)
    linear.weight = nn.Parameter(weight((33, 70)))
    made = nf4.NF4Linear(linear)
    plain = nn.Linear(70, 33, bias=bias, dtype=dtype)
    plain.weight = nn.Parameter(nf4.dequantize(made.weight, (33, 70), dtype))
    if bias:
        made.bias = plain.bias = nn.Parameter(linear.bias.to(dtype))
    if lora is None:
        return made, plain
    for layer in (made, plain):
        layer.requires_grad_(False)  # as `LoRA.apply` does
    pair = LoRALinear(made, lora), LoRALinear(plain, lora)
    generator = torch.Generator().manual_seed(3)
    for a, b in zip(*(list(each.parameters())[-2 - lora.dora :] for each in pair), strict=True):
        a.data.copy_(b.data.normal_(generator=generator))
    return pair


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "lora", [None, LoRA(rank=2), LoRA(rank=2, dora=True, dropout=0.3)], ids=["plain", "lora", "dora"]
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_results_and_gradients_are_those_of_the_weights_that_it_stands_for(
    lora: LoRA | None, bias: bool, dtype: torch.dtype, autocast: bool
) -> None:
    found = []
    for layer in layers(lora, bias, dtype):
        x = torch.randn(2, 5, 70, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
        torch.manual_seed(5)  # of dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.float().square().sum().backward()
        learned = [p.grad for name, p in layer.named_parameters() if "weight" not in name and "bias" not in name]
        found.append([y.detach(), x.grad, *learned])
    if lora is not None and lora.dora and dtype == torch.bfloat16:  # the rows' lengths are of the float32 weights
        torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    else:
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_only_the_bits_are_kept_for_the_backward_pass() -> None:
    layer = nf4.NF4Linear(nn.Linear(256, 512))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 256, requires_grad=True))
    assert sum(tensor.nbytes for tensor in kept) == layer.weight.nbytes < 0.6 * 256 * 512


def test_the_operators_keep_to_what_the_compiler_takes_them_for() -> None:
    bits, x = nf4.quantize(weight((6, 8))), torch.randn(3, 8, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for given in ((x, bits, torch.randn(6), 6, False), (x[None], bits, None, 6, False)):
        torch.library.opcheck(torch.ops.fiddlehead.nf4_linear.default, given, test_utils=checks)


@pytest.mark.slow
@pytest.mark.long
def test_a_compiled_layer_computes_the_same() -> None:
    layer, x = nf4.NF4Linear(nn.Linear(8, 6)), torch.randn(3, 8, requires_grad=True)
    compiled: Any = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(*(torch.autograd.grad(each(x).square().sum(), x)[0] for each in (compiled, layer)))


@pytest.mark.slow
def test_one_compiled_kernel_serves_weights_of_every_shape() -> None:
    """A model has more shapes than PyTorch compiles one function for, each in the forward and in the backward pass."""
    shapes = [(64, 32 + 7 * i) for i in range(5)] + [(32 + 9 * i, 64) for i in range(5)]
    assert len(shapes) > torch._dynamo.config.recompile_limit
    for shape in shapes:
        bits, x = nf4.quantize(weight(shape)), torch.randn(3, shape[1], requires_grad=True)
        y = torch.ops.fiddlehead.nf4_linear(x, bits, None, shape[0], True)
        y.sum().backward()
        stood_for = nf4.dequantize(bits, shape, torch.float32)
        torch.testing.assert_close(y, x @ stood_for.T)
        torch.testing.assert_close(x.grad, stood_for.sum(dim=0).expand(3, -1))


def small(**changes: Any) -> Transformer:
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    return Transformer(TransformerConfig(**(sizes | changes)))


def test_all_linear_layers_in_the_layers_are_stored_so_with_or_without_adapters() -> None:
    model = small()
    nf4.quantize_layers(model)
    LoRA(rank=2, target_modules=["linear_qkv"]).apply(model)
    linears = {f"layers.0.{n}.weight" for n in ("self_attention.linear_qkv", "self_attention.linear_proj")}
    linears |= {f"layers.0.mlp.{n}.weight" for n in ("linear_fc1", "linear_fc2")}
    assert nf4.quantized(model) == linears
    assert all(math.isfinite(value) for value in model(torch.tensor([[1, 2, 3]])).flatten().tolist())
    assert model.fused_rows() == {}
    with pytest.raises(ConfigError, match="rounded to 4 bits"):
        merge(model)


@pytest.mark.parametrize("given", ["nf3", "int4", True, 4])
def test_another_way_to_store_the_base_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantize_base=.*nf4"):
        LoRA(quantize_base=given)
