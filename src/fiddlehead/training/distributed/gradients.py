"""Gradient clipping: the norm of all gradients, and their scaling, also where a rank holds a shard of them.

The host never waits for the device. torch's own `get_total_norm` needs all gradients to be sharded in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fiddlehead.models.parallel import Layout, local


def gradients_of(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """The existing gradients, by the names of their parameters."""
    return {name: parameter.grad for name, parameter in named_parameters if parameter.grad is not None}


@torch.no_grad()
def global_norm(gradients: Mapping[str, torch.Tensor], layout: Layout | None = None) -> torch.Tensor:
    """The 2-norm of all gradients together, the same on every rank; a scalar on their device.

    Args:
        layout: the places of this rank's shards of the gradients; None if the gradients are whole.
    """
    if layout is None:
        return _norm(list(gradients.values()))
    by_ranks: dict[int, list[torch.Tensor]] = {}
    for name, gradient in gradients.items():
        for each in layout.local_slices(name, gradient):
            by_ranks.setdefault(each.ranks, []).append(local(gradient)[each.local])
    # Replicas on several ranks count once.
    squares = [_norm(slices).float() ** 2 / ranks for ranks, slices in by_ranks.items()]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=layout.mesh.device_type)
    torch.distributed.all_reduce(total)
    return total.sqrt()


def clip(
    gradients: Mapping[str, torch.Tensor],
    limit: float,
    layout: Layout | None = None,
    optimizer: Any = None,
) -> torch.Tensor:
    """Scales the gradients down to the norm `limit` if theirs is greater; returns the norm before.

    Args:
        limit: infinity leaves them as they are.
        layout: as in `global_norm`.
        optimizer: it scales the gradients itself in its next step if it has a `gradient_factor`, which saves reading
            and writing all of them.
    """
    norm = global_norm(gradients, layout)
    if limit < math.inf:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        if hasattr(optimizer, "gradient_factor"):
            optimizer.gradient_factor = factor
        else:
            scale(gradients, factor)
    return norm


@torch.no_grad()
def scale(gradients: Mapping[str, torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies all gradients by a scalar on their device."""
    if gradients:  # a stage of a pipeline may have none
        torch._foreach_mul_([local(gradient) for gradient in gradients.values()], factor)  # pyright: ignore[reportPrivateImportUsage]


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    if all(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return torch.nn.utils.get_total_norm(tensors)
    # PyTorch would round it to three digits. Its kernel takes tensors of one dtype; the norms keep their order.
    norms: dict[int, torch.Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        alike = [tensors[place] for place in places]
        found = torch._foreach_norm(alike, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        norms.update(zip(places, found, strict=True))
    return torch.linalg.vector_norm(torch.stack([norms[place] for place in sorted(norms)]))
