"""What computes the feed-forward of each layer, and what all kernels for it need."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from math import isnan
from typing import Any, Literal, NamedTuple

import torch

from fiddlehead.attention import Package, Target
from fiddlehead.models.config import TransformerConfig

MlpBackend = Literal["auto", "quack", "triton", "torch"]
RECOMPUTED = (None, "full")
"""The values of `activation_checkpointing` that kernels for the feed-forward go with."""
_LARGEST_ERROR = 0.02
"""Of a small feed-forward; what is computed in bfloat16 is off by 0.004."""


class MlpChoice(NamedTuple):
    """What computes the feed-forward of each layer."""

    backend: Literal["quack", "triton", "torch"]
    why_not: str = ""
    """Why no kernel does; "" if one does, or if PyTorch was asked for."""

    def __str__(self) -> str:
        return f"{self.backend}{f': {self.why_not}' if self.why_not else ''}"


def why_not_anywhere(config: TransformerConfig, dtype: torch.dtype) -> str | None:
    """Why no kernel can compute a model's feed-forward, with products in `dtype`; None if some can."""
    if config.num_moe_experts is not None:
        return "num_moe_experts: experts have grouped products"
    if config.activation != "swiglu":
        return f"activation={config.activation!r}: only 'swiglu'"
    if config.add_bias_linear:
        return "add_bias_linear: takes no biases"
    return None if dtype == torch.bfloat16 else f"{str(dtype).removeprefix('torch.')}: only bfloat16"


def why_not_there(target: Target) -> str | None:
    """Why no kernel is taken on `target`, whatever the model; None if they can be."""
    hopper = target.device_type == "cuda" and target.sm == 90
    return None if hopper else f"needs a Hopper GPU, not {target.name}; others were not measured"


def installed(name: str) -> Package:
    """A package by its version alone."""
    try:
        return Package(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Package()


def try_out(package: Package, errors: Callable[[torch.device], Mapping[str, float]]) -> tuple[Package, float | None]:
    """A package as it works on this machine's GPU, and its largest error there if it could be computed.

    Args:
        errors: computes a small feed-forward, and returns its relative errors against float64.
    """
    try:
        found = errors(torch.device("cuda"))
    except Exception as error:  # whatever its compiler raises where it does not fit
        first = (str(error).splitlines() or [""])[0]
        return Package(package.version, f"its products fail: {type(error).__name__}: {first}"), None
    wrong = [f"{name} by {error:.1g}" for name, error in found.items() if not error < _LARGEST_ERROR]  # NaN is, too
    problem = f"its products are wrong here: {', '.join(wrong)}" if wrong else None
    return Package(package.version, problem), max(found.values(), key=lambda error: (isnan(error), error))


def errors_of(
    computed: Callable[..., torch.Tensor],
    exact: Callable[..., torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device,
) -> dict[str, float]:
    """The relative errors of `computed` in bfloat16 on a device: of its output "y", and of the gradient of each input.

    Args:
        exact: the same function, for float64.
        shapes: of the inputs, by name, and of the output's gradient, "dy".
    """
    generator = torch.Generator("cpu").manual_seed(0)
    # Models are made where the default device and dtype are others than these.
    like: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    drawn = {name: torch.randn(shape, **like).bfloat16() for name, shape in shapes.items()}

    def results(dtype: torch.dtype, where: torch.device, compute: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        *inputs, dy = (value.to(where, dtype) for value in drawn.values())
        with torch.enable_grad(), torch.autocast(where.type, enabled=False):
            y = compute(*(value.requires_grad_() for value in inputs))
            return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    found, expected = results(torch.bfloat16, device, computed), results(torch.float64, torch.device("cpu"), exact)
    names = ["y", *(f"d{name}" for name in shapes if name != "dy")]
    return {
        name: float((got.cpu().double() - right).norm() / right.norm())
        for name, got, right in zip(names, found, expected, strict=True)
    }
