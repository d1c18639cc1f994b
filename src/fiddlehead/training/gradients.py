"""The norm of the gradients, and their scaling, also where a rank holds a part of them; nothing waits for the device.

torch's own `get_total_norm` takes all gradients to be cut in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor

from fiddlehead.training.sharding import local


def gradients_of(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients that there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, the same on every rank; a scalar on their device."""
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    by_copies: dict[int, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(_copies(gradient), []).append(local(gradient))
    # A part that several ranks hold counts once.
    squares = [torch.nn.utils.get_total_norm(parts).float() ** 2 / copies for copies, parts in by_copies.items()]
    total = torch.stack(squares).sum()
    torch.distributed.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def scale(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies all gradients by a scalar on their device."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)  # pyright: ignore[reportPrivateImportUsage]


def _copies(gradient: torch.Tensor) -> int:
    """How many ranks hold the same part of a gradient."""
    parts = 1
    if isinstance(gradient, DTensor):
        for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
            assert not placement.is_partial(), "a gradient that is yet to be added up over the ranks"
            parts *= 1 if placement.is_replicate() else size
    return torch.distributed.get_world_size() // parts
