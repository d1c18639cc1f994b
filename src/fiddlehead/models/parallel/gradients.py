"""Gradients of parameters that are whole, split, or in copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.parallel.shards import copied_from, copies, size_of, splits_over
from fiddlehead.models.transformer import Transformer

DIMS = ("dp_replicate", "dp_shard", "ep", "cp", "tp")


@torch.no_grad()
def reduce_gradients(transformer: Transformer, mesh: DeviceMesh, averaged: Collection[str] = ()) -> None:
    """Makes the gradients those of the mean of all processes' losses, each of which is the mean over its own tokens.

    To be called once a step, after the last backward pass.

    Args:
        averaged: dimensions of the mesh over which FSDP2 or DDP has averaged the gradients of all parameters that are
            not split over them: those are left as they are.
    """
    gradients = list(_gradients(transformer))
    factors = {dim: 1 / size_of(mesh, dim) for dim in DIMS}
    for dim in DIMS:
        if factors[dim] == 1:
            continue
        split = [x for x in gradients if x.splits_over == dim]
        whole = [] if dim in averaged else [x for x in gradients if x.splits_over != dim]
        scaled = [x.local for x in split + whole]
        if scaled:
            # Before the sum, as NCCL's average is not gloo's. What is split has the sum already, by the backward pass.
            torch._foreach_mul_(scaled, factors[dim])  # pyright: ignore[reportPrivateImportUsage]
        group = mesh.get_group(dim)
        _sum([x.local for x in whole], group)
        if dim == "tp":
            _sum_copies(split, transformer.config, mesh)


@torch.no_grad()
def grad_norm(transformer: Transformer, mesh: DeviceMesh) -> torch.Tensor:
    """The norm of all gradients, each counted once, after `reduce_gradients`; the same on every process."""
    sums: dict[tuple[dist.ProcessGroup, ...], torch.Tensor] = {}
    tp = size_of(mesh, "tp")
    for gradient in _gradients(transformer):
        groups = [*gradient.shard_groups]
        if gradient.splits_over is not None and size_of(mesh, gradient.splits_over) > 1:
            groups.append(mesh.get_group(gradient.splits_over))
        square = _square(gradient.local)
        if (start := gradient.copied_from(transformer.config, tp)) is not None:
            square = _square(gradient.local[:start]) + _square(gradient.local[start:]) / copies(transformer.config, tp)
        key = tuple(groups)
        sums[key] = sums[key] + square if key in sums else square
    total = torch.zeros(())
    for groups, square in sums.items():
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total.to(square.device) + square
    return total.sqrt()


class _Gradient(NamedTuple):
    name: str
    local: torch.Tensor
    """What this process has of it, which FSDP2 may have split further by rows."""
    splits_over: str | None
    first_row: int
    """Of `local`, in what tensor or expert parallelism leaves to this process."""
    shard_groups: tuple[dist.ProcessGroup, ...]
    """Over which FSDP2 has split it."""

    def copied_from(self, config: TransformerConfig, tp: int) -> int | None:
        """As `shards.copied_from`, of `local`."""
        row = copied_from(self.name, config, tp)
        return None if row is None else min(max(row - self.first_row, 0), len(self.local))


def _gradients(transformer: nn.Module) -> Iterator[_Gradient]:
    config: TransformerConfig = transformer.config  # type: ignore[assignment]
    for name, parameter in transformer.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        first_row, groups = 0, []
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            for dim, placement in enumerate(gradient.placements):
                if placement.is_shard():
                    assert placement.is_shard(dim=0), "by rows, as fully_shard does unless told otherwise"
                    groups.append(mesh.get_group(dim))
                    rows = -(-gradient.shape[0] // mesh.size(dim))  # as torch.chunk divides
                    first_row = rows * mesh.get_local_rank(dim)
            gradient = gradient.to_local()
        yield _Gradient(name, gradient, splits_over(name, config), first_row, tuple(groups))


def _sum_copies(split: Iterable[_Gradient], config: TransformerConfig, mesh: DeviceMesh) -> None:
    """Sums the gradients of key/value heads that several processes of a tensor-parallel group have."""
    tp, number = size_of(mesh, "tp"), copies(config, size_of(mesh, "tp"))
    own, everyone = [], []
    for gradient in split:
        start = gradient.copied_from(config, tp)
        if start is None or start == len(gradient.local):
            continue
        # One sum over all processes, with a place for each group of copies, needs no groups of processes of its own.
        rows = gradient.local[start:]
        places = rows.new_zeros(tp // number, *rows.shape)
        places[mesh.get_local_rank("tp") // number] = rows
        own.append(rows)
        everyone.append(places)
    _sum(everyone, mesh.get_group("tp"))
    for rows, places in zip(own, everyone, strict=True):
        rows.copy_(places[mesh.get_local_rank("tp") // number])


def _sum(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sums each over a group, in place: large ones one by one, and the many small ones as one."""
    large = [x for x in tensors if x.numel() >= SMALL and x.is_contiguous()]
    waits = [dist.all_reduce(x, group=group, async_op=True) for x in large]
    apart = {id(x) for x in large}
    small: dict[torch.dtype, list[torch.Tensor]] = {}
    for x in tensors:
        if id(x) not in apart and x.numel():
            small.setdefault(x.dtype, []).append(x)
    for each in small.values():
        flat = torch.cat([x.flatten() for x in each])
        dist.all_reduce(flat, group=group)
        for x, summed in zip(each, flat.split([x.numel() for x in each]), strict=True):
            x.copy_(summed.view_as(x))
    for wait in waits:
        if wait is not None:
            wait.wait()


SMALL = 1 << 16
"""Numbers in a tensor up to which joining it with others costs less than a message of its own."""


def _square(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32) ** 2
