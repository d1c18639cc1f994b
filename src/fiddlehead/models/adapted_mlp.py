"""The feed-forward with SwiGLU and adapters, in which Triton kernels compute all that is between its large products.

They read the output of the first product, add the adapter's part, apply SwiGLU, and multiply with the second adapter's
first matrix: all in one pass. The backward pass does the reverse in another, from the first product's output alone.

Shapes: N tokens, C hidden size, F feed-forward size, R rank.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fiddlehead.attention import Package, Target
from fiddlehead.models import mlp_choice
from fiddlehead.models.adapted_linear import added, product
from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.linear import summed
from fiddlehead.models.lora import LoRA

RANKS = (16, 32, 64)
"""Columns of the kernels' tiles; other ranks are filled up with zeros. At 64 the backward pass gains little."""


def why_not(
    config: TransformerConfig, lora: LoRA, dtype: torch.dtype, target: Target, tensor: int = 1, *, probe: bool = False
) -> str | None:
    """Why the kernels cannot compute a model's feed-forward on `target`; None if they can.

    Args:
        dtype: of the products.
        tensor: the processes that share the feed-forward's width.
        probe: also compute a small feed-forward, on this machine's GPU; otherwise only the version is looked up.
    """
    package = tried if probe else lambda: (installed(), None)
    return (
        mlp_choice.why_not_there(target)
        or why_not_anywhere(config, lora, dtype, tensor)
        or why_not_installed(package()[0])
    )


def why_not_anywhere(config: TransformerConfig, lora: LoRA, dtype: torch.dtype, tensor: int = 1) -> str | None:
    """Why the kernels cannot compute a model's feed-forward on any GPU; None if they can on some."""
    if reason := mlp_choice.why_not_anywhere(config, dtype):
        return reason
    if tensor > 1:
        return f"tensor_parallel={tensor}: not for split layers"
    if lora.dora:
        return "lora.dora=True: not for lengths that are learned"
    if lora.dropout:
        return f"lora.dropout={lora.dropout:g}: only 0"
    if lora.rank > max(RANKS):
        return f"lora.rank={lora.rank}: at most {max(RANKS)}"
    layers = (f"layers.{i}.mlp.linear_{each}" for i in range(config.num_layers) for each in ("fc1", "fc2"))
    without = next((name for name in layers if not lora.adapts(name)), None)
    return without and f"lora.target_modules: {without} has no adapter"


def why_not_installed(package: Package) -> str | None:
    """Why Triton cannot be used as it is installed; None if it can."""
    return package.why_not("triton")


@lru_cache
def installed() -> Package:
    """Triton by its version alone; PyTorch's builds for GPUs bring it."""
    return mlp_choice.installed("triton")


@lru_cache
def tried() -> tuple[Package, float | None]:
    """Triton as the kernels work on this machine's GPU, and the largest of `small_errors` if it was computed."""
    package = installed()
    return (package, None) if why_not_installed(package) else mlp_choice.try_out(package, small_errors)


def small_errors(device: torch.device) -> dict[str, float]:
    """The relative errors of the output and the gradients of a small feed-forward, against float64."""
    generator = torch.Generator("cpu").manual_seed(1)
    like: Any = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    w1, w2 = (torch.randn(shape, **like).bfloat16() for shape in ((2 * 136, 64), (64, 136)))

    def computed(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        return adapted_mlp(x, w1.to(x), a1, b1, w2.to(x), a2, b2)

    def exact(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        gate, up = (x @ (w1.to(x) + b1 @ a1).T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ (w2.to(x) + b2 @ a2).T

    small = {"a1": (5, 64), "b1": (2 * 136, 5), "a2": (5, 136), "b2": (64, 5)}
    return mlp_choice.errors_of(computed, exact, {"x": (72, 64), **small, "dy": (72, 64)}, device)


def adapted_mlp(x: Tensor, w1: Tensor, a1: Tensor, b1: Tensor, w2: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """`swiglu(x W1'^T) W2'^T` with W1' = w1 + b1 a1 and W2' = w2 + b2 a2; (..., C), in the dtype of products.

    Args:
        x: (..., C).
        w1: (2 F, C), the rows of the gate first; or what `nf4.quantize` made of it. It gets no gradient.
        a1: (R, C); like the other parts of adapters it may be wider than products, as its gradient then is, too.
        b1: (2 F, R).
        w2: (C, F), like w1.
        a2: (R, F).
        b2: (C, R).
    """
    rows = x.to(product_dtype(x)).flatten(0, -2)
    return _AdaptedMlp.apply(rows, w1, a1, b1, w2, a2, b2).view(x.shape)


class _AdaptedMlp(torch.autograd.Function):
    """Keeps the first product's output, and the adapters' R values of each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, a1: Tensor, b1: Tensor, w2: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.dtypes = a1.dtype, b1.dtype, a2.dtype, b2.dtype
        a1, b1, a2, b2 = (each.to(x.dtype) for each in (a1, b1, a2, b2))
        z1, before = F.linear(x, a1), product(x, w1, b1.shape[0], True)
        activated, z2 = _activate_op(before, z1, b1, a2)
        ctx.save_for_backward(x, w1, a1, b1, w2, a2, b2, before, z1, z2)
        return added(activated, w2, z2, b2, None, True)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,), (x, w1, a1, b1, w2, a2, b2, before, z1, z2) = grad_outputs, ctx.saved_tensors
        dz2 = dy @ b2
        dbefore, dz1, db1, da2 = _gradients_op(product(dy, w2, a2.shape[1], False), before, z1, b1, dz2, a2)
        dx = added(dbefore, w1, dz1, a1, None, False) if ctx.needs_input_grad[0] else None
        of_a1, of_b1, of_a2, of_b2 = ctx.dtypes
        da1, db2 = summed(dz1.T, x, of_a1), summed(dy.T, z2, of_b2)
        return dx, None, da1, db1.to(of_b1), None, da2.to(of_a2), db2


def _activate(before: Tensor, z1: Tensor, b1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU of `before + z1 b1^T`, (N, F); and its product with `a2^T`, (N, R).

    Args:
        before: (N, 2 F), the gate first.
    """
    if before.is_cuda:
        from fiddlehead.models import adapted_swiglu_kernel  # Triton

        R = z1.shape[1]
        given = (_filled(tensor, dim) for tensor, dim in ((z1, 1), (b1, 1), (a2, 0)))
        activated, z2 = adapted_swiglu_kernel.activate(before, *given)
        return activated, z2[:, :R].contiguous()
    gate, up = _whole(before, z1, b1).chunk(2, dim=1)
    activated = (F.silu(gate) * up).to(before.dtype)
    return activated, activated @ a2.T


def _gradients(
    dactivated: Tensor, before: Tensor, z1: Tensor, b1: Tensor, dz2: Tensor, a2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `before` (N, 2 F), z1 (N, R), b1 (2 F, R) and a2 (R, F); those of b1 and a2 at least in float32.

    Args:
        dactivated: (N, F), the gradient of the activations without the part `dz2 a2` that comes through the adapter.
        dz2: (N, R).
    """
    if before.is_cuda:
        from fiddlehead.models import adapted_swiglu_kernel  # Triton

        R = z1.shape[1]
        given = (_filled(tensor, dim) for tensor, dim in ((z1, 1), (b1, 1), (dz2, 1), (a2, 0)))
        dbefore, dz1, db1, da2 = adapted_swiglu_kernel.gradients(dactivated, before, *given)
        return dbefore, dz1[:, :R].contiguous(), db1[:, :R].contiguous(), da2[:R].contiguous()
    gate, up = _whole(before, z1, b1).chunk(2, dim=1)
    d, s = _whole(dactivated, dz2, a2.T), gate.sigmoid()
    dbefore = torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], dim=1).to(before.dtype)
    activated = (gate * s * up).to(before.dtype)
    wide = torch.promote_types(before.dtype, torch.float32)
    return dbefore, dbefore @ b1, (dbefore.T @ z1).to(wide), (dz2.T @ activated).to(wide)


def _whole(product: Tensor, z: Tensor, b: Tensor) -> Tensor:
    """A product with its adapter's part, in float32 or wider."""
    wide = torch.promote_types(product.dtype, torch.float32)
    return product.to(wide) + z.to(wide) @ b.to(wide).T


def _filled(tensor: Tensor, dim: int) -> Tensor:
    """Zeros up to the next of `RANKS` along a dimension."""
    rank = tensor.shape[dim]
    lacking = next(each for each in RANKS if each >= rank) - rank
    return F.pad(tensor, (0, lacking) if dim == 1 else (0, 0, 0, lacking)).contiguous()


# Operators, because the compiler cannot look into kernels that programs of Triton are passed to by hand.
_activate_op = torch.library.custom_op("fiddlehead::adapted_swiglu", _activate, mutates_args=())
_gradients_op = torch.library.custom_op("fiddlehead::adapted_swiglu_backward", _gradients, mutates_args=())


@_activate_op.register_fake
def _(before: Tensor, z1: Tensor, b1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    return before.new_empty(before.shape[0], before.shape[1] // 2), torch.empty_like(z1)


@_gradients_op.register_fake
def _(
    dactivated: Tensor, before: Tensor, z1: Tensor, b1: Tensor, dz2: Tensor, a2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(before.dtype, torch.float32)
    of_b1, of_a2 = (torch.empty_like(each, dtype=wide) for each in (b1, a2))
    return torch.empty_like(before), torch.empty_like(z1), of_b1, of_a2
