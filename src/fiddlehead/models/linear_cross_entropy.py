"""The cross-entropy of a projection to the vocabulary, computed without all logits in memory at once."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.linear import summed
from fiddlehead.models.scaled import multiply_

CHUNK_TOKENS = 4096
"""Enough for a matrix product at full speed; the logits of as many are 1 GiB for a vocabulary of 128k in bfloat16."""


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    compiled: bool = False,
    divisor: torch.Tensor | int = 1,
) -> torch.Tensor:
    """The cross-entropy of softmax(scale x weight), summed over the tokens with a label, / divisor; a float32 scalar.

    The forward pass also computes the gradients, chunk by chunk, while a chunk's logits are in memory: nothing is
    computed twice, and the kept gradients are as large as `x` and `weight`. The softmax is always in float32.

    The kept gradients are those of the result. Where the gradient that arrives in the backward pass is 1, they stay as
    they are; otherwise they are multiplied by it, which reads and writes all of them. The gradients of the logits are
    divided before they are rounded to the products' dtype. A divisor that is not a power of 2 changes their rounding.

    Args:
        x: the input of the projection, (N, C).
        weight: (V, C).
        labels: (N,).
        scale: a factor on the logits.
        softcap: logits become softcap x tanh(logits / softcap).
        ignore_index: the label of ignored tokens.
        compiled: one kernel for the elementwise operations on logits: on a GPU ours, elsewhere the compiler's.
        divisor: a number, or a tensor without dimensions.
    """
    how = scale, softcap, ignore_index
    learns_weight = weight.requires_grad and torch.is_grad_enabled()
    arguments = x, weight.detach(), labels, product_dtype(x), compiled, how, learns_weight, divisor
    of_x: Any = _LinearCrossEntropy.apply(*arguments)
    mean, grad_weight = of_x
    # The weight has a function of its own, as a pipeline may compute the gradients of weights in another pass. The sum
    # is what that pass begins with: before torch 2.13, it must be an operation of PyTorch's.
    return mean if grad_weight is None else mean + _Weight.apply(weight, grad_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        compiled: bool,
        how: tuple[float, float | None, int],
        learns_weight: bool,
        divisor: torch.Tensor | int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        learns_x = ctx.needs_input_grad[0]
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            nats = torch.zeros((), device=x.device, dtype=_softmax_dtype(dtype))
            # Filled on the device, to which a number would have to be copied.
            divisor = divisor.to(nats) if isinstance(divisor, torch.Tensor) else torch.full_like(nats, divisor)
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if learns_x else None
            grad_weight = None
            turn = _as_one_kernel(dtype, x.device) if compiled else nats_and_gradient
            for start in range(0, x.shape[0], CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                chunk = x[part].to(dtype)
                logits = F.linear(chunk, w)
                of_chunk, gradient = turn(logits, labels[part], *how, divisor)
                del logits
                nats += of_chunk
                if grad_x is not None:
                    grad_x[part] = gradient @ w
                if learns_weight:
                    grad_weight = _add_product(grad_weight, gradient.T, chunk)
                del gradient  # before the next chunk's: each is as large as its logits
            nats /= divisor
        ctx.save_for_backward(grad_x)
        if grad_weight is None:
            return nats, None
        grad_weight = grad_weight.to(weight.dtype)
        ctx.mark_non_differentiable(grad_weight)
        ctx.set_materialize_grads(False)  # or the backward pass gets zeros as large as the weight
        return nats, grad_weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_x,) = ctx.saved_tensors
        # In place, as nobody else has it.
        return (None if grad_x is None else multiply_(grad_x, grad_outputs[0]), *[None] * 7)


class _Weight(torch.autograd.Function):
    """Zero, whose gradient with respect to the weight was computed before."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros((), device=weight.device, dtype=_softmax_dtype(weight.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return multiply_(gradient, grad_outputs[0]), None  # in place: it is as large as the embedding


def nats_and_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    divisor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross-entropy of `logits` (n, V), and the gradient of sum / divisor with respect to them."""
    z = logits.to(_softmax_dtype(logits.dtype))
    if scale != 1:
        z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    counts = (labels != ignore_index)[:, None]
    target = torch.where(counts, labels[:, None], 0)
    highest, at_target = z.amax(dim=-1, keepdim=True), z.gather(1, target)
    probabilities = None
    if z.is_cpu and not torch.compiler.is_compiling():
        # A kernel that takes a fraction of the time of its parts. The highest probability is at least 1 / V.
        probabilities = torch.softmax(z, dim=-1)
        total = highest - probabilities.amax(dim=-1, keepdim=True).log_()
    else:
        # The compiler reads the logits once for both of these, and three times in all for a logsumexp and the gradient.
        total = highest + (z - highest).exp_().sum(dim=-1, keepdim=True).log_()
    nats = torch.where(counts, total - at_target, 0.0).sum()

    def through_scaling(gradient: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gradient = gradient.mul_(counts * (scale / divisor))
        return gradient if softcap is None else gradient * (1 - (z / softcap).square())

    # The probability of the label is close to 1 where much was learned: 1 less is worked out before it is rounded.
    of_target = through_scaling((at_target - total).expm1(), at_target).to(logits.dtype)
    gradient = through_scaling((z - total).exp_() if probabilities is None else probabilities, z).to(logits.dtype)
    if not torch.compiler.is_compiling():
        return nats, gradient.scatter_(1, target, of_target)
    column = torch.arange(logits.shape[1], device=logits.device)
    return nats, torch.where(column == target, of_target, gradient)  # of which the compiler makes one pass


def _as_one_kernel(dtype: torch.dtype, device: torch.device) -> Any:
    if device.type != "cuda" or dtype == torch.float64:
        return _compiled()
    from fiddlehead.models.softmax_kernel import nats_and_gradient_  # Triton, which the compiler needs there too

    return nats_and_gradient_


@functools.cache
def _compiled() -> Any:
    return torch.compile(nats_and_gradient, fullgraph=True)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b, in float32 at least."""
    dtype = _softmax_dtype(a.dtype)
    if total is None:
        return summed(a, b, dtype)
    if a.dtype == dtype:
        return total.addmm_(a, b)
    if not a.is_cuda:
        return total.add_(a @ b)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)
