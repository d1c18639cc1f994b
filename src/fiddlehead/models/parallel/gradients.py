"""Reduces the gradients of parameters that are whole, split, or replicated."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import nn

from fiddlehead.models.parallel.shards import Layout, local, size_of, splits_over

DIMS = ("dp_replicate", "dp_shard", "ep", "cp", "tp")


@torch.no_grad()
def reduce_gradients(
    transformer: nn.Module, layout: Layout, averaged: Collection[str] = (), divided: Collection[str] = ()
) -> None:
    """Turns gradients into those of the mean of all processes' losses; each loss is a mean over the process's tokens.

    Call it once in each step, after the last backward pass.

    Args:
        averaged: dimensions of the mesh over which FSDP2 or DDP has averaged the gradients of all parameters that are
            not split over them: those are left as they are.
        divided: dimensions of the mesh by whose sizes each loss was divided before its backward pass.
    """
    gradients = {name: local(p.grad) for name, p in transformer.named_parameters() if p.grad is not None}
    for dim in DIMS:
        size = size_of(layout.mesh, dim)
        if size == 1:
            continue
        split = [x for name, x in gradients.items() if splits_over(name, layout.config) == dim]
        whole = [x for name, x in gradients.items() if splits_over(name, layout.config) != dim and dim not in averaged]
        if (split or whole) and dim not in divided:
            # Before the sum, as NCCL's average is not gloo's. What is split has the sum already, by the backward pass.
            torch._foreach_mul_(split + whole, 1 / size)  # pyright: ignore[reportPrivateImportUsage]
        _sum(whole, layout.mesh.get_group(dim))
    _sum_replicas(transformer, layout)


def _sum_replicas(transformer: nn.Module, layout: Layout) -> None:
    """Sums the gradients of key/value heads that several processes of a tensor-parallel group share."""
    tp = size_of(layout.mesh, "tp")
    own, everyone, places = [], [], []
    for name, parameter in transformer.named_parameters():
        if parameter.grad is None:
            continue
        for each in layout.local_slices(name, parameter.grad):
            if each.replicas == 1:
                continue
            # One sum over all processes, with a place for each group of replicas, needs no groups of its own.
            rows, place = local(parameter.grad)[each.local], layout.mesh.get_local_rank("tp") // each.replicas
            own.append(rows)
            everyone.append(rows.new_zeros(tp // each.replicas, *rows.shape))
            everyone[-1][place] = rows
            places.append(place)
    if everyone:
        _sum(everyone, layout.mesh.get_group("tp"))
    for rows, all_rows, place in zip(own, everyone, places, strict=True):
        rows.copy_(all_rows[place])


def _sum(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sums each tensor over a group, in place: large ones one by one, and the many small ones together."""
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
"""The largest tensor that is joined with others, because that costs less than a separate message."""
