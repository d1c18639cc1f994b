"""Frozen weights in 4-bit NormalFloat (NF4), whose scales are quantized too: QLoRA (Dettmers et al. 2023).

A weight is flattened and cut into blocks of 64. Each value is divided by the greatest absolute value of its block, the
block's scale, and replaced by the nearest of 16 levels, quantiles of a normal distribution. The scales are kept in 8
bits: less the mean of all, in steps of 1/127 of the greatest in 256 of them. That is 4.127 bits a weight.

The paper keeps the scales as 8-bit floats; whole numbers are more exact here, and compile on every GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.linear import Linear

if TYPE_CHECKING:
    from fiddlehead.models.transformer import Transformer

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of the 16 codes; appendix E of the paper."""
BLOCK = 64
"""The weights that have a scale together."""
SCALES = 256
"""The scales that have a step together."""
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)
"""Of a weight."""
DEQUANTIZING = {False: 6, True: 2}
"""The most bytes a weight that `dequantize` needs for a result in bfloat16; not compiled and compiled."""
DEQUANTIZED = {False: 14.5, True: 2.5}
"""The bytes that it reads and writes for each weight; counted and not measured."""


class NF4Linear(Linear):
    """A linear layer with its weight in NF4, which is not trained.

    Args:
        linear: the layer that it replaces; also on the meta device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = nn.Parameter(quantize(linear.weight), requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return nf4_linear(input, self.weight, self.bias, self.out_features)


def quantize_layers(transformer: Transformer) -> None:
    """Stores the weights of the linear layers in the transformer's layers in NF4, in place; also on the meta device.

    Adapters are put on them later.
    """
    for name, linear in quantizable(transformer).items():
        transformer.set_submodule(name, NF4Linear(linear))


def quantizable(transformer: Transformer) -> dict[str, Linear]:
    """The linear layers whose weights may be in NF4, by name: those in the transformer's layers."""
    modules = transformer.layers.named_modules(prefix="layers")
    return {name: module for name, module in modules if isinstance(module, Linear)}


def quantized(transformer: nn.Module) -> set[str]:
    """The names of the weights that are in NF4."""
    linears = ((name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name, linear in linears if is_quantized(linear.weight)}


def is_quantized(weight: Tensor) -> bool:
    """Whether the weight of a linear layer is what `quantize` returned."""
    return weight.dim() == 1


@torch.no_grad()
def quantize(weight: Tensor) -> Tensor:
    """A weight in NF4, as one tensor of bits with one dimension; `dequantize` reverses it.

    It holds the mean and the steps of the scales in float32, the scales in int8, and the codes, two a byte. Its dtype
    is bfloat16, though its values mean nothing: FSDP2 gathers such parameters as they are, and in PyTorch 2.11 takes
    none of whole numbers.
    """
    _, blocks, groups = _sizes(weight.shape)
    if weight.is_meta:
        return weight.new_empty(ceil(sum(_parts(blocks, groups)) / 2), dtype=torch.bfloat16)
    cut = _filled(weight.float().flatten(), BLOCK)
    largest = cut.abs().amax(dim=1)
    cut /= torch.where(largest > 0, largest, 1.0)[:, None]
    codes = torch.bucketize(cut, _between(weight.device), out_int32=True).to(torch.uint8).flatten()
    mean = largest.mean()
    rest = _filled(largest - mean, SCALES)
    steps = rest.abs().amax(dim=1) / 127
    scales = (rest / torch.where(steps > 0, steps, 1.0)[:, None]).round().to(torch.int8).flatten()[:blocks]
    packed = codes[0::2] << 4 | codes[1::2]
    parts = [torch.cat([mean[None], steps]).view(torch.uint8), scales.view(torch.uint8), packed]
    return _filled(torch.cat(parts), 2).flatten().view(torch.bfloat16)


@torch.no_grad()
def dequantize(bits: Tensor, shape: Sequence[int], dtype: torch.dtype, *, compiled: bool = False) -> Tensor:
    """The weight of this shape that a result of `quantize` stands for; computed in float32.

    Args:
        compiled: compute it in one kernel, which the compiler makes at the first call.
    """
    numel, blocks, groups = _sizes(shape)
    parts = _parts(blocks, groups)
    steps, scales, packed = bits.view(torch.uint8)[: sum(parts)].split(parts)
    decode = _compiled_decode() if compiled else _decode
    mean, steps = steps.view(torch.float32).split([1, groups])
    return (
        decode(packed, scales.view(torch.int8), steps, mean, _pairs(bits.device), dtype).view(-1)[:numel].view(*shape)
    )


def _decode(packed: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of each block, (blocks, 64)."""
    scale = scales * steps[:, None].expand(-1, SCALES).reshape(-1)[: len(scales)] + mean
    values = pairs.index_select(0, packed.int()).view(-1, BLOCK)
    return torch.mul(values, scale[:, None], out=torch.empty_like(values, dtype=dtype))


@cache
def _compiled_decode() -> Callable[..., Tensor]:
    return torch.compile(_decode, fullgraph=True, dynamic=True)


def nf4_linear(x: Tensor, bits: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`F.linear` with a weight in NF4, which is not trained; (..., in) to (..., out) in the dtype of a product with x.

    The weight is dequantized in each pass, so that only its bits are in memory between them.
    """
    x = x.to(product_dtype(x))
    bias = None if bias is None else bias.to(x.dtype)
    return _nf4_linear(x, bits, bias, out_features, torch.compiler.is_compiling())


def nf4_product(x: Tensor, bits: Tensor, features: int, transposed: bool) -> Tensor:
    """x times a weight in NF4, or times the transposed one; (N, in) to (N, features). It has no gradient."""
    compiled = torch.compiler.is_compiling()
    if transposed:
        return _nf4_linear(x, bits, None, features, compiled)
    return _nf4_linear_backward(x, bits, features, compiled)


# Operators, so that the compiler cannot keep the dequantized weight from the forward to the backward pass.


@torch.library.custom_op("fiddlehead::nf4_linear", mutates_args=())
def _nf4_linear(x: Tensor, bits: Tensor, bias: Tensor | None, out_features: int, compiled: bool) -> Tensor:
    return F.linear(x, dequantize(bits, (out_features, x.shape[-1]), x.dtype, compiled=compiled), bias)


@_nf4_linear.register_fake
def _(x: Tensor, bits: Tensor, bias: Tensor | None, out_features: int, compiled: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("fiddlehead::nf4_linear_backward", mutates_args=())
def _nf4_linear_backward(gradient: Tensor, bits: Tensor, in_features: int, compiled: bool) -> Tensor:
    return gradient @ dequantize(bits, (gradient.shape[-1], in_features), gradient.dtype, compiled=compiled)


@_nf4_linear_backward.register_fake
def _(gradient: Tensor, bits: Tensor, in_features: int, compiled: bool) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bits, _, _, ctx.compiled = inputs
    ctx.save_for_backward(bits)
    ctx.in_features = x.shape[-1]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _nf4_linear_backward(gradient, *ctx.saved_tensors, ctx.in_features, ctx.compiled), None, None, None, None


_nf4_linear.register_autograd(_gradients, setup_context=_save)


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    """How many weights, blocks of them, and groups of scales a weight has."""
    numel = prod(shape)
    blocks = ceil(numel / BLOCK)
    return numel, blocks, ceil(blocks / SCALES)


def _parts(blocks: int, groups: int) -> list[int]:
    """The bytes of the mean and the steps, of the scales, and of the codes."""
    return [4 * (1 + groups), blocks, blocks * BLOCK // 2]


def _filled(values: Tensor, size: int) -> Tensor:
    """Values in rows of `size`, the last one filled with zeros."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size)


@lru_cache(maxsize=8)
def _between(device: torch.device) -> Tensor:
    """The middles between the levels, (15,) float32."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return ((levels[1:] + levels[:-1]) / 2).to(device, torch.float32)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte of codes, (256, 2) float32."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return torch.cartesian_prod(levels, levels)
