"""Computes in tiles of tokens what works on each token by itself.

Only one tile's intermediate tensors are then in memory, and not those of a whole batch of long sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fiddlehead.models.autocast import autocasts


def in_tiles(
    run: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tokens: int,
    parameters: Callable[[], Sequence[torch.Tensor]],
    *,
    needed: bool = True,
) -> torch.Tensor:
    """`run(x)`, computed for so many tokens at a time, and again, tile by tile, in the backward pass.

    Only x is kept from the forward to the backward pass (TiledMLP of Arctic Long Sequence Training, arXiv 2506.13996).
    Each parameter gets one gradient, the sum over all tiles, so that hooks which wait for gradients, as those of FSDP2
    and DDP do, run once.

    Args:
        run: (1, n, C) to (1, n, C); it must compute each token by itself. It may draw random numbers.
        x: (B, T, C).
        tokens: the tokens of a tile; the last tile may have fewer.
        parameters: returns those of `run`. It is called in each pass, because a strategy may replace them in between.
        needed: whether the result is needed; if not, it has the right shape and no values. It is not needed where a
            layer that ends with this is computed again for its backward pass.
    """
    if not torch.is_grad_enabled():
        return _run(run, x, tokens)
    return _InTiles.apply(x, run, tokens, parameters, needed, *parameters())  # type: ignore[return-value]


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
        tokens: int,
        parameters: Callable[[], Sequence[torch.Tensor]],
        needed: bool,
        *learned: torch.Tensor,
    ) -> torch.Tensor:
        ctx.run, ctx.tokens, ctx.parameters = run, tokens, parameters
        ctx.casts_to = torch.get_autocast_dtype(x.device.type) if autocasts(x) else None
        ctx.random = _random_state(x.device)
        ctx.save_for_backward(x)
        if not needed:
            return x.new_empty(1).expand_as(x)  # takes no memory
        with _casting(x.device, ctx.casts_to):
            return _run(run, x, tokens)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grad_outputs
        learns_x, *learns = ctx.needs_input_grad[:1] + ctx.needs_input_grad[_OTHERS:]
        learned = [each for each, learnt in zip(ctx.parameters(), learns, strict=True) if learnt]
        flat, grad = _flat(x), _flat(grad)
        grad_x = torch.empty_like(flat) if learns_x else None
        sums = _Sums(len(learned), several=flat.shape[1] > ctx.tokens)
        with _random_numbers(x.device, ctx.random), _casting(x.device, ctx.casts_to):
            for part in _parts(flat.shape[1], ctx.tokens):
                tile = flat[:, part].detach().requires_grad_(learns_x)
                with torch.enable_grad():
                    out = ctx.run(tile)
                inputs = [*learned, tile] if learns_x else learned
                grads: list[Any] = list(torch.autograd.grad(out, inputs, grad[:, part], allow_unused=True))
                if grad_x is not None:
                    grad_x[:, part] = grads.pop()
                sums.add(grads)
                del out, grads  # before the next tile's
        of_learned = iter(sums.of(learned))
        given = [next(of_learned) if learnt else None for learnt in learns]
        return (None if grad_x is None else grad_x.view(x.shape), *[None] * (_OTHERS - 1), *given)


_OTHERS = 5
"""The arguments of `_InTiles` before the parameters."""


class _Sums:
    """The sums of the parameters' gradients over tiles; in float32 at least if there are `several` tiles."""

    def __init__(self, count: int, *, several: bool) -> None:
        self.several = several
        self.sums: list[torch.Tensor | None] = [None] * count

    def add(self, gradients: list[torch.Tensor | None]) -> None:
        """Adds those of a tile, and removes them from the list; None where a parameter is not used."""
        for number in reversed(range(len(self.sums))):
            gradient, total = gradients.pop(), self.sums[number]
            if gradient is None:
                continue
            if total is not None:
                total.add_(gradient)
            elif self.several:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self.sums[number] = gradient.to(wide, copy=True)  # others may have the memory of a gradient
            else:
                self.sums[number] = gradient

    def of(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The sums, in the dtype of each parameter."""
        pairs = zip(parameters, self.sums, strict=True)
        return [None if total is None else total.to(parameter.dtype) for parameter, total in pairs]


def _run(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tokens: int) -> torch.Tensor:
    flat, out = _flat(x), None
    for part in _parts(flat.shape[1], tokens):
        tile = run(flat[:, part])
        if out is None:
            out = tile.new_empty(flat.shape)
        out[:, part] = tile
    assert out is not None
    return out.view(x.shape)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(B, T, C) to (1, B T, C), without a gradient: with several sequences too, a tile has the tokens it is to have."""
    return x.detach().reshape(1, -1, x.shape[-1])


def _parts(total: int, tokens: int) -> Iterator[slice]:
    for start in range(0, max(total, 1), tokens):
        yield slice(start, start + tokens)


def _casting(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Autocast as in the forward pass.

    Its cache is off: what the forward pass puts there has no gradient, and the backward pass would find it.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_numbers(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> Iterator[None]:
    """Within it, random numbers are those that followed the state; after it, they go on as if it had not been."""
    of_cpu, of_gpu = state
    with torch.random.fork_rng([device] if of_gpu is not None else []):
        torch.set_rng_state(of_cpu)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu, device)
        yield
