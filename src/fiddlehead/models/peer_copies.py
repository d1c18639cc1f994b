"""Communication by copies between the memories of GPUs, beside matrix products.

NCCL's kernels and matrix products slow each other down when they run at the same time. Copies are the work of other
units of a GPU, and take place while the GPU computes what does not need them: the product with the rows that a process
has itself, or its own part of a sum. Each process has two buffers which the others of its group can read (PyTorch's
symmetric memory): while one is read, the next transfer can fill the other.

Shapes: n processes of a group, each with t rows. A whole tensor, (n t, ...), has one process's part after another's.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_SIGNALS = 1024
"""Bytes behind a buffer: a number for each process, which it raises when it is as far."""
_WORKS = "works"
_peers: dict[str, Peers] = {}
"""The processes that are connected, by the name of their group."""


def connect(group: ProcessGroup, device: torch.device) -> str | None:
    """Prepares copies between the processes of a group, and tries one; all of them call it together.

    Returns:
        Why they cannot copy; None if they can.
    """
    if device.type != "cuda":
        return f"{device.type} devices cannot copy from each other's memory"
    if (known := _peers.get(group.group_name)) is not None and known.group is group:
        return None
    if len(hosts := set(_of_all(socket.gethostname(), group))) > 1:
        return f"the ranks are on {', '.join(sorted(hosts))}"
    try:
        _peers[group.group_name] = peers = Peers(group, device)
        whole = peers.gather(torch.full((1, 16), float(group.rank()), device=device)).end()
        own, others = peers.start_sum(whole, torch.ones(16, 16, device=device))
        total = own + torch.ops._c10d_functional.wait_tensor(others)
        sums = [16.0 * group.size() * group.rank()]
        right = whole[:, 0].tolist() == list(range(group.size())) and total[:, 0].tolist() == sums
        found = _WORKS if right else "a copy arrived with other values"
    except Exception as error:  # the other ranks wait for what this one says
        found = (str(error).splitlines() or [type(error).__name__])[0]
    reason = next((said for said in _of_all(found, group) if said != _WORKS), None)
    if reason is not None:
        _peers.pop(group.group_name, None)
    return reason


def connected(group: str) -> Peers:
    """The processes of a group that `connect` has prepared."""
    return _peers[group]


def _of_all(value: str, group: ProcessGroup) -> list[str]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


class Slot:
    """A buffer of this process that the others of its group can read, and theirs."""

    def __init__(self, peers: Peers) -> None:
        self.peers, self.size, self.meetings = peers, 0, 0
        self.handle: Any = None
        self.unused: torch.cuda.Event | None = None
        """When all have read what the latest transfer put into it."""
        self._views: dict[Any, Tensor] = {}

    def grow(self, size: int) -> None:
        """Makes it anew with at least `size` bytes; all processes call it together."""
        from torch.distributed import _symmetric_memory

        if self.unused is not None:
            self.unused.synchronize()
        self._views.clear()
        self.handle, self.meetings = None, 0
        self.size = -(-size // _SIGNALS) * _SIGNALS
        buffer = _symmetric_memory.empty(self.size + _SIGNALS, dtype=torch.uint8, device=self.peers.device)
        buffer.zero_()
        self.handle = _symmetric_memory.rendezvous(buffer, self.peers.name)
        self.handle.barrier()
        torch.cuda.current_stream().synchronize()

    def of(self, rank: int, shape: torch.Size, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """The buffer of a process from element `offset` on."""
        key = rank, shape, dtype, offset
        if key not in self._views:
            self._views[key] = self.handle.get_buffer(rank, shape, dtype, offset)
        return self._views[key]

    def meet(self) -> None:
        """Waits, on the current stream, until all processes are as far.

        Nothing is computed for it: a kernel would have to wait until a product that fills the GPU has ended.
        """
        self.meetings += 1
        stream, rank = torch.cuda.current_stream().cuda_stream, self.peers.rank
        own = self._signals(rank)
        for each in self.peers.others:
            _on_stream("cuStreamWriteValue32_v2", stream, self._signals(each) + 4 * rank, self.meetings)
        for each in self.peers.others:
            _on_stream("cuStreamWaitValue32_v2", stream, own + 4 * each, self.meetings)

    def _signals(self, rank: int) -> int:
        """The address of the numbers behind the buffer of a process."""
        return self.of(rank, torch.Size([_SIGNALS // 4]), torch.int32, self.size // 4).data_ptr()

    def release(self) -> None:
        """All have read it, once all processes are as far."""
        self.meet()
        self.unused = self.peers.mark()


@lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _on_stream(operation: str, stream: int, address: int, value: int) -> None:
    """Writes a number to an address, or waits until what is there is as large, when a stream has come to this point."""
    given = ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(0)
    if (status := getattr(_driver(), operation)(*given)) != 0:
        raise RuntimeError(f"{operation} gives the error {status}")


class Gathering:
    """All processes' parts of a tensor, (n t, ...), on their way to `whole`."""

    def __init__(self, peers: Peers, x: Tensor) -> None:
        self.peers, self.whole = peers, x.new_empty(peers.size * x.shape[0], *x.shape[1:])
        self.source = x  # until `end`, as the copies read it
        self.parts = self.whole.chunk(peers.size)
        self.arrivals: dict[int, Any] = {}
        """By process: when its part is there. This process's is the last."""

    def wait(self, rank: int) -> Tensor:
        """A process's part, once it is there."""
        self.peers.wait(self.arrivals[rank])
        return self.parts[rank]

    def end(self) -> Tensor:
        """The whole, once it is there."""
        self.wait(self.peers.rank)
        return self.whole


class Peers:
    """The buffers of a group, and the stream of the copies between them."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.name, self.size, self.rank = group.group_name, group.size(), group.rank()
        # Of a high priority, to begin also while a product has work for all multiprocessors.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.slots = [Slot(self), Slot(self)]

    @property
    def others(self) -> list[int]:
        """The other processes, beginning with the next, so that they do not all read from the same one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def gather(self, x: Tensor, *, keep: bool = True) -> Gathering:
        """Starts to copy all processes' x, (t, ...); `end` the gathering before it or what it gives is freed.

        Args:
            x: contiguous.
            keep: also copy this process's own part.
        """
        slot = self.take(x.nbytes)
        gathering = Gathering(self, x)
        with self.aside():
            slot.of(self.rank, x.shape, x.dtype).copy_(x)
            slot.meet()
            for each in self.others:
                gathering.parts[each].copy_(slot.of(each, x.shape, x.dtype))
                gathering.arrivals[each] = self.mark()
            slot.release()
            if keep:
                gathering.parts[self.rank].copy_(x)
            gathering.arrivals[self.rank] = self.mark()
        return gathering

    def gather_while(self, x: Tensor, compute: Callable[[int, Tensor], object], *, keep: bool = False) -> Tensor:
        """Calls `compute` with the number of each process and its part of x as soon as it is here, its own first.

        Returns:
            The gathered parts, (n t, ...); without `keep`, the others' only.
        """
        gathering = self.gather(x, keep=keep)
        compute(self.rank, x)
        for each in self.others:
            compute(each, gathering.wait(each))
        return gathering.end()

    def start_sum(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Starts to sum the processes' products of x, (n t, ..., C), with weight, (C, D), each for its rows.

        Returns:
            This process's products for its rows, (t, ..., D); and what `_c10d_functional.wait_tensor` turns into the
            sum of the others'.
        """
        parts = x.chunk(self.size)
        own = x.new_empty(*parts[0].shape[:-1], weight.shape[1])
        slot = self.take(self.size * own.nbytes)
        for each in self.others:
            out = slot.of(self.rank, own.shape, x.dtype, each * own.numel())
            torch.mm(rows(parts[each]), weight, out=rows(out))
        others = torch.empty_like(own)
        with self.aside():
            slot.meet()
            arrived = [slot.of(each, own.shape, x.dtype, self.rank * own.numel()) for each in self.others]
            if len(arrived) == 1:
                others.copy_(arrived[0])
            else:  # not rounded in between
                exact = arrived[0].to(torch.promote_types(x.dtype, torch.float32), copy=True)
                for part in arrived[1:]:
                    exact.add_(part)
                others.copy_(exact)
            self.note(others)
            slot.release()
        torch.mm(rows(parts[self.rank]), weight, out=rows(own))
        return own, others

    def take(self, size: int) -> Slot:
        """A buffer of at least `size` bytes, which the current stream may write to; all processes call it together."""
        slot = self.slots.pop(0)
        self.slots.append(slot)
        if slot.unused is not None:
            self.wait(slot.unused)
        if slot.size < size:
            slot.grow(size)
        return slot

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it, work goes to the stream of the copies, after what the current stream has so far."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> Any:
        """A point in the current stream."""
        return torch.cuda.current_stream().record_event()

    def wait(self, mark: Any) -> None:
        """Lets the current stream wait until another has come to a point."""
        torch.cuda.current_stream().wait_event(mark)

    def note(self, started: Tensor) -> None:
        """Lets `wait_tensor` wait for what the current stream does up to here."""
        from torch.distributed._symmetric_memory import Work

        torch._C._distributed_c10d._register_work(started, Work())  # pyright: ignore


def rows(x: Tensor) -> Tensor:
    """(..., C) to (N, C)."""
    return x.view(-1, x.shape[-1])
