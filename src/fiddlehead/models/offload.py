"""Keeps the inputs of layers in main memory from the forward to the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class HostMemory:
    """Copies tensors of a GPU to pinned main memory and back, on a stream of its own, while the GPU computes.

    Args:
        moves: whether a tensor is moved; others stay where they are. By default tensors of a GPU are.
    """

    def __init__(self, moves: Callable[[torch.Tensor], bool] = lambda x: x.is_cuda) -> None:
        self._moves = moves
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._latest: Callable[[], Kept | None] = lambda: None

    def keeping_input(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The function `forward`, whose first argument autograd finds in main memory if it saves it as it is."""

        def run(x: torch.Tensor, *others: Any) -> torch.Tensor:
            place, shape = x.data_ptr(), x.shape  # autograd keeps the hook, which so must not hold x

            def pack(saved: torch.Tensor) -> torch.Tensor | Kept:
                return self.keep(saved) if saved.data_ptr() == place and saved.shape == shape else saved

            with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                return forward(x, *others)

        return run

    def keep(self, x: torch.Tensor) -> torch.Tensor | Kept:
        """A copy of x in main memory; x itself if it is not moved."""
        if not self._moves(x):
            return x
        kept = Kept(self, x, self._latest)
        self._latest = weakref.ref(kept)
        return kept

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream that copies; None for a CPU."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Kept:
    """A tensor in main memory.

    Args:
        before: returns the tensor that was kept before this one, or None if it is needed no more. The backward pass
            asks for it next, so it is on its way back while the GPU computes with this one.
    """

    def __init__(self, memory: HostMemory, x: torch.Tensor, before: Callable[[], Kept | None]) -> None:
        self._memory, self._device, self._before = memory, x.device, before
        self._arriving: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        self._copy(self._host, x, x)

    def back(self) -> torch.Tensor:
        """The tensor on its device."""
        x, event = self.start_back()
        self._arriving = None
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        if (before := self._before()) is not None:
            before.start_back()
        return x

    def start_back(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Starts the copy to the device, if it has not been started; returns it, and what to wait for."""
        if self._arriving is None:
            # It has the memory of the stream that computes, so that what was freed there is used again.
            x = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._arriving = x, self._copy(x, self._host, x)
        return self._arriving

    def _copy(self, to: torch.Tensor, source: torch.Tensor, on_device: torch.Tensor) -> torch.cuda.Event | None:
        """Copies when what the GPU has been given to do is done; returns what to wait for."""
        stream = self._memory.stream(self._device)
        if stream is None:
            to.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        on_device.record_stream(stream)  # its memory is not used again before the copy has ended
        event = torch.cuda.Event()
        event.record(stream)
        return event


def _unpack(kept: torch.Tensor | Kept) -> torch.Tensor:
    return kept.back() if isinstance(kept, Kept) else kept
