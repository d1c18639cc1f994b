"""Ring attention: keys and values go round between processes that share sequences (Liu et al. 2023).

Each process keeps its queries, attends to one process's keys after another's, and puts the results together by the
logarithms of the softmaxes' sums, in float32. While it computes, the next keys and values are on their way; in the
backward pass, so are the gradients of keys and values, in float32, until they are back where they belong. Heads are not
split, and keys and values travel with their own number of heads, so the number of processes does not depend on them.

Of the 2 n chunks of a sequence, process i of n has the chunks i and 2 n - 1 - i (zigzag). Of an earlier process's keys,
all its queries see the first chunk, and none sees the second. Of a later process's keys, only the queries of its second
chunk see any, and they see both chunks. So all processes have equal work in each step, and no step after the first
needs a mask, unless documents are packed.

PyTorch's own ring, `torch.distributed.tensor.experimental.context_parallel`, is not used: it replaces
`scaled_dot_product_attention` for DTensors, so that flash-attn's kernels, softcap, and documents that are kept apart
are not possible, and it has no CPU kernel. It is experimental, and has moved between the releases from 2.11 to 2.13.

Shapes: B batch, t the tokens that a process holds, H query heads, G key/value heads, D head dim, L = t / 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fiddlehead.attention.call import refuse_mixed
from fiddlehead.attention.parts import Part, attend_to_part, part_gradients
from fiddlehead.models.collectives import Group, end, start_exchange
from fiddlehead.models.places import Documents

Tensor = torch.Tensor


@dataclass(frozen=True)
class Ring:
    """The processes between which keys and values go round.

    Args:
        group: all processes that share a sequence.
        size: how many parts of a sequence go round. If that is fewer than processes, neighbours have the same part of
            the sequences, each with some of the heads (`HeadExchange`).
    """

    group: Group
    size: int

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None,
        *,
        sinks: Tensor | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Causal attention, with gradients: q (B, t, H, D), k and v (B, t, G, D) to (B, t, H, D).

        Args:
            documents: those of the whole sequences; none has tokens of two rows.
            sinks: as `attend` takes them; so are the others.

        Raises:
            ConfigError: q, k and v have different dtypes, or no kernel serves the call.
        """
        refuse_mixed(q.dtype, k.dtype, v.dtype)  # k and v are stacked, which would promote them
        cu_seqlens, max_seqlen = (None, None) if documents is None else documents
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        asked = (q, k, v) if sinks is None else (q, k, v, sinks)
        training = torch.is_grad_enabled() and any(x.requires_grad for x in asked)
        numbers = (max_seqlen or 0, factor, softcap, training, backend)
        return _forward(
            q, k, v, sinks, cu_seqlens, *numbers, self.group.name, self.group.size, self.group.rank, self.size
        )[0]


class _Place(NamedTuple):
    """This process's place in a ring."""

    group: Group
    size: int

    @property
    def number(self) -> int:
        return self.group.rank // self._neighbours

    @property
    def _neighbours(self) -> int:
        return self.group.size // self.size

    def pass_on(self, x: Tensor) -> Tensor:
        """Starts to send x to the next process of the ring; returns what `end` turns into that received."""
        n, each = self.group.size, self._neighbours
        return start_exchange(x, (self.group.rank + each) % n, (self.group.rank - each) % n, self.group)


class _Step(NamedTuple):
    """The part of the keys of one other process, and of the queries, that see each other; all of them or one half."""

    queries: slice
    keys: slice
    part: Part


def _steps(place: _Place, q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, part: Part) -> Iterator[_Step]:
    """What is computed while keys and values go round: first with the process's own, then with those before it."""
    B, t = q.shape[:2]
    L, last = t // 2, 2 * place.size - 1
    own = (place.number, last - place.number)
    for step in range(place.size):
        number = (place.number - step) % place.size
        theirs = (number, last - number)
        if step == 0:
            queries, keys = own, theirs
        elif number < place.number:
            queries, keys = own, theirs[:1]
        else:
            queries, keys = own[1:], theirs
        part = part._replace(causal=step == 0)
        if cu_seqlens is not None:
            part = part._replace(
                cu_seqlens_q=_borders(cu_seqlens, queries, B, L, last + 1),
                cu_seqlens_k=_borders(cu_seqlens, keys, B, L, last + 1),
                max_seqlen_q=min(max_seqlen, len(queries) * L),
                max_seqlen_k=min(max_seqlen, len(keys) * L),
            )
        yield _Step(slice(t - len(queries) * L, t), slice(0, len(keys) * L), part)


def _borders(cu_seqlens: Tensor, chunks: tuple[int, ...], rows: int, L: int, of: int) -> Tensor:
    """`cu_seqlens` of those of the tokens that are in some of the `of` chunks, of L tokens, of each row."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)[:, None] * (of * L)
    starts = torch.cat([row + chunk * L for chunk in chunks], dim=1).flatten()
    return (cu_seqlens[:, None] - starts).clamp(0, L).sum(dim=1, dtype=cu_seqlens.dtype)


# One operator for each pass, so that a compiled layer has a ring as one node, as any other attention.
@torch.library.custom_op("fiddlehead::ring_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    softcap: float,
    training: bool,
    backend: str,
    group: str,
    processes: int,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each softmax's sum, (B, H, t): +inf where a query sees no key."""
    place = _Place(Group(group, processes, rank), size)
    out = q.new_zeros(q.shape, dtype=_wide(q))
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=_wide(q))
    kv = torch.stack([k, v])
    part = Part(scale, softcap=softcap, training=training, backend=backend)
    for number, step in enumerate(_steps(place, q, cu_seqlens, max_seqlen, part)):
        following = place.pass_on(kv) if number < size - 1 else None
        k, v = kv[:, :, step.keys]
        new = attend_to_part(q[:, step.queries], k, v, step.part)
        _put_together(out[:, step.queries], lse[..., step.queries], *new)
        if following is not None:
            kv = end(following)
    if sinks is not None:
        without, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out *= _by_query(torch.exp(without - lse))
    return out.to(q.dtype), lse.masked_fill_(lse == float("-inf"), float("inf"))


@_forward.register_fake
def _(q, k, v, *rest):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=_wide(q)
    )


@torch.library.custom_op("fiddlehead::ring_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    training: bool,
    backend: str,
    group: str,
    processes: int,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and sinks; the keys and values go round once more, and their gradients with them."""
    place = _Place(Group(group, processes, rank), size)
    dq = q.new_zeros(q.shape, dtype=_wide(q))
    kv = torch.stack([k, v])
    dkv = kv.new_zeros(kv.shape, dtype=_wide(q))
    part = Part(scale, softcap=softcap, training=True, backend=backend)
    arriving = None
    for number, step in enumerate(_steps(place, q, cu_seqlens, max_seqlen, part)):
        following = place.pass_on(kv) if number < size - 1 else None
        k, v = kv[:, :, step.keys]
        at = step.queries
        of_all = out[:, at], lse[..., at].contiguous()
        dq_part, *dkv_part = part_gradients(dout[:, at], q[:, at], k, v, *of_all, step.part)
        dq[:, at] += dq_part
        # The gradients that the processes before this one have found, of the keys that it has seen just now.
        dkv = dkv if arriving is None else end(arriving)
        for total, found in zip(dkv[:, :, step.keys], dkv_part, strict=True):
            total += found
        arriving = place.pass_on(dkv)
        if following is not None:
            kv = end(following)
    assert arriving is not None
    dk, dv = (x.to(q.dtype, copy=True) for x in end(arriving))
    dsinks = q.new_zeros(0)
    if sinks is not None:
        mean = (dout.to(_wide(q)) * out).sum(dim=-1)
        dsinks = -(_by_query(torch.exp(sinks.to(lse.dtype)[:, None] - lse)).squeeze(-1) * mean).sum(dim=(0, 1))
        dsinks = dsinks.to(sinks.dtype)
    return dq.to(q.dtype), dk, dv, dsinks


@_backward.register_fake
def _(dout, q, k, v, sinks, *rest):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.numbers = inputs[5:]


def _of_autograd(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # a layer that is computed again gives them once
    *dqkv, dsinks = _backward(dout, *saved, *ctx.numbers)
    return *dqkv, None if saved[3] is None else dsinks, *[None] * (1 + len(ctx.numbers))


_forward.register_autograd(_of_autograd, setup_context=_setup_context)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which results are added up."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_query(x: Tensor) -> Tensor:
    """(B, H, T) to (B, T, H, 1)."""
    return x.transpose(1, 2)[..., None]


def _put_together(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> None:
    """Adds the result of more keys to `out` and `lse`, in place."""
    total = torch.logaddexp(lse, new_lse)
    finite = total.masked_fill(total == float("-inf"), 0.0)  # infinity minus infinity is not a number
    out.mul_(_by_query((lse - finite).exp())).add_(new * _by_query((new_lse - finite).exp()))
    lse.copy_(total)
