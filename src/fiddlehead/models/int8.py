"""Weights in 8 bits, for generation: whole numbers, with a scale for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.linear import Linear, linear
from fiddlehead.models.nf4 import quantizable
from fiddlehead.models.transformer import Transformer


class Int8Linear(Linear):
    """A linear layer with its weight in int8, (out, in), and `scale`, (out,) float32; it is not trained.

    A weight is the nearest multiple of its channel's scale, 1/127 of the greatest absolute value there.

    Args:
        layer: the layer that it replaces.
    """

    scale: Tensor

    @torch.no_grad()
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        scale = layer.weight.abs().amax(dim=1).float() / 127
        steps = layer.weight / torch.where(scale > 0, scale, 1.0)[:, None]
        self.weight = nn.Parameter(steps.round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        out = linear(input, self.weight.to(input.dtype)) * self.scale.to(input.dtype)
        return out if self.bias is None else out + self.bias


def to_int8(transformer: Transformer) -> None:
    """Stores the weights of the linear layers in the transformer's layers in int8, in place.

    The embedding, the output layer and the norms stay as they are.

    Raises:
        ConfigError: the model is a mixture of experts.
    """
    if transformer.config.num_moe_experts is not None:
        raise ConfigError(Problem("weights", "int8", "the experts of a mixture are not stored in 8 bits; leave it out"))
    for name, layer in quantizable(transformer).items():
        transformer.set_submodule(name, Int8Linear(layer))
