"""Communication between processes that share a sequence or a layer, with support for autograd and torch.compile.

Shapes: B batch, t the tokens that a process holds, n processes of a group, T = n x t, H query heads, G key/value heads,
D head dim. Tensors must have the same shape on all processes of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from fiddlehead.models import peer_products
from fiddlehead.models.autocast import product_dtype


@dataclass(frozen=True)
class Group:
    """The processes along one dimension of a mesh, and this process's index."""

    name: str = ""
    size: int = 1
    rank: int = 0
    before: int = 0
    """Other processes of the communicator `name`, before these; the next: after these. They only exchange with these
    processes by `_exchange`, in which all take part."""
    after: int = 0
    copies: bool = False
    """Whether they copy from the memories of each other's GPUs, instead of NCCL's kernels; see `peer_copies`."""

    @classmethod
    def of(cls, mesh: DeviceMesh, dim: str) -> Group:
        """The processes along `dim`; only this process if the mesh has no such dimension."""
        if dim not in (mesh.mesh_dim_names or ()):
            return cls()
        group = mesh.get_group(dim)
        return cls(group.group_name, group.size(), mesh.get_local_rank(dim))

    def part(self, size: int) -> Group:
        """The `size` neighbours of which this process is one; they exchange when all neighbours do, by `_exchange`."""
        before = self.rank // size * size
        return Group(self.name, size, self.rank - before, before, self.size - before - size)


@dataclass(frozen=True)
class SequenceSplit:
    """The part of each sequence that a process has outside attention: parts are in order, cp first, then tp.

    With ring attention a sequence is put in another order before it is cut. Of the 2 n chunks of n processes, each has
    one from the beginning and one from the end, so that under a causal mask all have the same work.
    """

    cp: Group = Group()
    tp: Group = Group()
    ring: int = 1
    """The number of parts of "cp" between which keys and values go round; 1: there is no ring."""

    @property
    def parts(self) -> int:
        """The number of parts of a sequence."""
        return self.cp.size * self.tp.size

    def own(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This process's part of a tensor that is whole along `dim`."""
        return part(self._in_order(x, dim), self.parts, self.cp.rank * self.tp.size + self.tp.rank, dim)

    def gathered(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The tensor whose parts the processes of a tensor-parallel group have."""
        return part(self._in_order(x, dim), self.cp.size, self.cp.rank, dim)

    def _in_order(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """x in the order of the processes."""
        if self.ring == 1:
            return x
        chunks = x.chunk(2 * self.ring, dim)
        return torch.cat([chunks[n] for rank in range(self.ring) for n in (rank, -1 - rank)], dim)

    def dropout(self, x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        """Dropout of this process's part of the sequences, (B, t, ...): what one process drops of the whole ones.

        The generators of the processes must have the same state.
        """
        if self.parts == 1 or not p or not training:
            return F.dropout(x, p, training)
        B, t, *rest = x.shape
        return x * self.own(F.dropout(x.new_ones(B, self.parts * t, *rest), p), dim=1)

    def dropout_of_columns(self, x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        """The same for the columns, (B, T, C / n), that a process has of the sequences of a tensor-parallel group."""
        if self.parts == 1 or not p or not training:
            return F.dropout(x, p, training)
        B, T, columns = x.shape
        kept = F.dropout(x.new_ones(B, self.cp.size * T, self.tp.size * columns), p)
        return x * part(self.gathered(kept, dim=1), self.tp.size, self.tp.rank, dim=2)


@dataclass(frozen=True)
class HeadExchange:
    """Exchanges a part of the sequence with all heads for the whole sequence with a part of the heads, and back.

    DeepSpeed-Ulysses (Jacobs et al. 2023). Query heads go to the processes in order. If there are fewer key/value heads
    than processes, each is sent to all processes that have its query heads.
    """

    group: Group

    def to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, t, H, D), k and v (B, t, G, D) to (B, T, H / n, D) and (B, T, max(G / n, 1), D)."""
        n = self.group.size
        if k.shape[2] < n:
            k, v = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (k, v))
        # One exchange for all three: what goes to one process lies together.
        each = [x.unflatten(2, (n, -1)) for x in (q, k, v)]
        sizes = [x.shape[3] for x in each]
        together = torch.cat(each, dim=3).flatten(2, 3)
        q, k, v = _SequenceToHeads.apply(together, self.group).split(sizes, dim=2)
        return q, k, v

    def to_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H / n, D) to (B, t, H, D)."""
        return _HeadsToSequence.apply(x, self.group)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The values of this process's query heads, from values of all heads: (H,) to (H / n,)."""
        return part(x, self.group.size, self.group.rank, 0)


def part(x: torch.Tensor, parts: int, number: int, dim: int) -> torch.Tensor:
    """One of equal parts of x along `dim`."""
    size = x.shape[dim] // parts
    return x.narrow(dim, number * size, size)


def by_sequence(x: torch.Tensor, n: int) -> torch.Tensor:
    """What n processes have of the sequences, one after another, (n x B, t, ...), as whole sequences, (B, T, ...)."""
    return x.unflatten(0, (n, -1)).transpose(0, 1).flatten(1, 2)


def by_process(x: torch.Tensor, n: int) -> torch.Tensor:
    """The reverse of `by_sequence`: (B, T, ...) to (n x B, t, ...)."""
    return x.unflatten(1, (n, -1)).transpose(0, 1).flatten(0, 1)


def linear_of_whole(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group) -> torch.Tensor:
    """A linear layer on whole sequences: each process gives (B, t, in) and gets (n x B, t, out) with its own weights.

    The result has one process's tokens after another's; `by_sequence` puts them in order, which costs a copy.

    The backward pass gathers the sequences again instead of keeping them (Korthikanti et al. 2022, section 4.2.2),
    while it computes gradients that do not need them.
    """
    # Cast before it is sent, which is half as much.
    dtype = product_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _LinearOfWhole.apply(x.to(dtype), weight.to(dtype), bias, group)


def linear_of_columns(x: torch.Tensor, weight: torch.Tensor, group: Group) -> torch.Tensor:
    """A linear layer whose input columns the processes share: (n x B, t, in / n) to each process's part (B, t, out).

    Args:
        x: one process's tokens after another's, as `by_process` returns them.
        weight: this process's columns, (out, in / n).
    """
    dtype = product_dtype(x)
    return _LinearOfColumns.apply(x.to(dtype), weight.to(dtype), group)


def exchange_rows(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """Sends rows to each process, in the order of processes, and returns the rows from each process.

    Args:
        x: (sum of `sent`, C).
        sent: how many rows go to each process.
        received: how many come from each.
    """
    return _ExchangeRows.apply(x, sent, received, group)


def exchange_counts(counts: torch.Tensor, group: Group) -> torch.Tensor:
    """Sends numbers to each process, (n, k), and returns the numbers from each; without gradients."""
    return _all_to_all(counts, group)


def start_exchange(x: torch.Tensor, to: int, source: int, group: Group) -> torch.Tensor:
    """Starts to send x to one process and to receive as much from another, without gradients; all processes call it.

    Returns what `end` turns into the tensor received; until then computation goes on.
    """
    sent, received = ([len(x) if rank == other else 0 for rank in range(group.size)] for other in (to, source))
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group.name)


def start_gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Starts to join all processes' parts of the first dimension, without gradients; `end` gives the result."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size, group.name)


def start_reduce_scatter(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Starts to sum x over the processes, each of which gets a part of the first dimension; as `start_gather`."""
    return torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name)


def end(started: torch.Tensor) -> torch.Tensor:
    """The result of what was started."""
    return torch.ops._c10d_functional.wait_tensor(started)


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sums x over the processes; its gradient is the sum of the gradients."""
    return _AllReduce.apply(x, group)


# Functions of our own rather than those of torch.distributed._functional_collectives: which of them have gradients, and
# what they are called, differs between torch 2.11 and 2.13. The operators below them do not.


class _LinearOfWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        if group.copies:
            y = peer_products.product_of_whole(x, weight, group.name, group.size)
            return y if bias is None else y + bias
        return F.linear(end(start_gather(x, group)), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, weight), group = grads, ctx.saved_tensors, ctx.group
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_bias = grad.sum(dim=(0, 1)) if needs_bias else None
        if group.copies:
            needs = needs_x, needs_weight
            return *peer_products.gradients_of_whole(x, weight, grad, group.name, group.size, *needs), grad_bias, None
        grad_x = grad_weight = whole = None
        if needs_weight:
            whole = start_gather(x, group)
        if needs_x:
            grad_x = start_reduce_scatter(grad @ weight, group)
        if whole is not None:
            grad_weight = grad.flatten(0, 1).T @ end(whole).flatten(0, 1)
        if grad_x is not None:
            grad_x = end(grad_x)
        return grad_x, grad_weight, grad_bias, None


class _LinearOfColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        if group.copies:
            return peer_products.sum_of_products(x, weight, group.name, group.size)
        return end(start_reduce_scatter(F.linear(x, weight), group))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, weight), group = grads, ctx.saved_tensors, ctx.group
        needs_x, needs_weight, _ = ctx.needs_input_grad
        if group.copies:
            needs = needs_x, needs_weight
            return *peer_products.gradients_of_sum(x, weight, grad, group.name, group.size, *needs), None
        whole = end(start_gather(grad, group))
        grad_x = whole @ weight if needs_x else None
        grad_weight = whole.flatten(0, 1).T @ x.flatten(0, 1) if needs_weight else None
        return grad_x, grad_weight, None


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _to_sequence(grads[0], ctx.group), None


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _to_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _to_heads(grads[0], ctx.group), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _sum(grads[0], ctx.group), None


def _to_heads(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.unflatten(2, (group.size, -1)).permute(2, 0, 1, 3, 4)  # n, B, t, heads of one process, D
    return _all_to_all(x, group).transpose(0, 1).flatten(1, 2)


def _to_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.unflatten(1, (group.size, -1)).transpose(0, 1)  # n, B, t, heads of one process, D
    return _all_to_all(x, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _all_to_all(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sends x[i] to process i; result[i] comes from process i."""
    one_each = [1] * group.size
    return _exchange(x.flatten(1), one_each, one_each, group).view(x.shape)


def _exchange(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    received, sent = ([0] * group.before + rows + [0] * group.after for rows in (received, sent))
    return end(torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group.name))


def _sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    return end(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.name))
