"""Where an AdamW keeps its state: with the parameters, or in main memory, which each step copies to the GPU and back.

For a GPU the memory is pinned, because other memory is copied slowly and while the host waits. PyTorch's pinned memory
has sizes that are powers of 2, which is 15 % more for the tensors of Llama 3 8B; so ours is registered with CUDA.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fiddlehead.errors import RunError
from fiddlehead.models.parallel import local

PIECE, PIECES = 2**24, 3
"""The most weights of which the state is copied at once; and how many such pieces are on the GPU: one that arrives, one
that is computed, and one that goes back."""


class Update(NamedTuple):
    """What a step does to one parameter, or to a part of one: the arguments of `update_weight`."""

    weight: torch.Tensor
    gradient: torch.Tensor
    low_bits: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    scalars: torch.Tensor
    beta1: float
    beta2: float
    eps: float

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors that are kept."""
        return [each for each in (self.low_bits, self.exp_avg, self.exp_avg_sq) if each is not None]

    def part(self, start: int, stop: int) -> Update:
        """The update of the weights from `start` to `stop`."""
        return Update(*(each if each is None else each[start:stop] for each in self[:5]), *self[5:])  # type: ignore

    def with_state(self, state: Sequence[torch.Tensor]) -> Update:
        """The update with its state in other tensors."""
        low_bits = None if self.low_bits is None else state[0]
        return self._replace(low_bits=low_bits, exp_avg=state[-2], exp_avg_sq=state[-1])


class KeepsState(torch.optim.Optimizer):
    """The base of optimizers that keep their state with the parameters."""

    def kept(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter; empty before its first step."""
        return self.state[parameter]

    def zeros(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor to keep, like the parameter in shape and shards."""
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)

    def take(self, updates: Iterable[Update], update: Callable[..., None]) -> None:
        """Calls `update` for each of the updates."""
        for each in updates:
            update(*each)


class Offloaded(KeepsState):
    """Keeps the state in main memory; to be named before the optimizer that it changes, as a base of a class.

    The step of a piece is computed on the GPU while the state of the next one arrives and that of the one before goes
    back. Nothing is computed otherwise than without this, and what is saved is the same. The host does not wait.
    """

    piece = PIECE

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._kept: dict[torch.Tensor, dict[str, Any]] = {}  # Lightning moves what is in `state` to the GPU
        self._streams: tuple[Any, Any] | None = None

    def kept(self, parameter: torch.Tensor) -> dict[str, Any]:
        """As `KeepsState.kept`."""
        return self._kept.setdefault(parameter, {})

    @torch.no_grad()
    def zeros(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `KeepsState.zeros`, in main memory."""
        kept = torch.empty_like(parameter, dtype=dtype, device="cpu", requires_grad=False)
        own: Any = local(kept)
        own.set_(main_memory(own.nbytes, pinned=parameter.is_cuda).view(dtype).view(own.shape))
        return kept

    def take(self, updates: Iterable[Update], update: Callable[..., None]) -> None:
        """As `KeepsState.take`, with the state on the GPU."""
        for each in self._through_device(updates):
            update(*each)

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with the state where it is; waits for what is on its way there."""
        saved = super().state_dict()
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        kept = {number: self._kept.get(parameter) for number, parameter in zip(numbers, self._parameters, strict=True)}
        saved["state"] = {number: dict(values) for number, values in kept.items() if values}
        self._wait()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, but takes the state out of `state_dict`: main memory may not have room for it twice."""
        super().load_state_dict({**state_dict, "state": {}})
        self._wait()
        self._kept.clear()
        parameters, state = self._parameters, state_dict["state"]
        for number in [*state]:
            parameter, values = parameters[int(number)], state.pop(number)
            for name in [*values]:
                self.kept(parameter)[name] = self._own(name, values.pop(name), parameter)

    def _own(self, name: str, value: Any, parameter: torch.Tensor) -> Any:
        if name == "step":
            return value.to(parameter.device) if isinstance(value, torch.Tensor) else value
        kept = self.zeros(parameter, value.dtype)
        local(kept).copy_(local(value))
        return kept

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _wait(self) -> None:
        if self._streams is not None:
            for stream in self._streams:
                stream.synchronize()

    def _through_device(self, updates: Iterable[Update]) -> Iterator[Update]:
        """The updates in pieces, with their state on the device; what is written to it goes back to main memory."""
        work = [
            each.part(start, start + self.piece)
            for each in updates
            for start in range(0, each.weight.numel(), self.piece)
        ]
        if not work:
            return
        device, most = work[0].weight.device, max(each.weight.numel() for each in work)
        now, arriving, leaving = self._streams_of(device)
        places = [[torch.empty(most, dtype=x.dtype, device=device) for x in work[0].state] for _ in work[:PIECES]]
        free: list[Any] = [now.record_event()] * len(places)
        ready: dict[int, Any] = {}

        def state(number: int) -> list[torch.Tensor]:
            return [x[: work[number].weight.numel()] for x in places[number % len(places)]]

        def start(number: int) -> None:
            arriving.wait_event(free[number % len(places)])
            with arriving:
                for to, source in zip(state(number), work[number].state, strict=True):
                    to.copy_(source, non_blocking=True)
            ready[number] = arriving.record_event()

        start(0)
        for number, each in enumerate(work):
            if number + 1 < len(work):
                start(number + 1)
            now.wait_event(ready.pop(number))
            yield each.with_state(state(number))
            leaving.wait_stream(now)
            with leaving:
                for to, source in zip(each.state, state(number), strict=True):
                    to.copy_(source, non_blocking=True)
            free[number % len(places)] = leaving.record_event()
        now.wait_stream(leaving)  # which also keeps the places until then, and the state for the next step

    def _streams_of(self, device: torch.device) -> tuple[Any, Any, Any]:
        """The streams that compute, copy to the device and copy from it."""
        if device.type != "cuda":
            return _Here(), _Here(), _Here()
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return torch.cuda.current_stream(device), *self._streams


class _Here:
    """What stands for the streams of a CPU, which does everything at once."""

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


def main_memory(size: int, *, pinned: bool) -> torch.Tensor:
    """So many bytes of main memory that are 0.

    Args:
        pinned: so that a GPU copies from and to it by itself.

    Raises:
        RunError: there is not so much that can be pinned.
    """
    if not pinned or not size:
        return torch.zeros(size, dtype=torch.uint8)
    return torch.frombuffer(_Pinned(size), dtype=torch.uint8)


class _Pinned(mmap.mmap):
    """Pinned main memory."""

    address: int | None = None
    """Of what CUDA has pinned."""

    def __new__(cls, size: int) -> _Pinned:
        self = super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.madvise(mmap.MADV_DONTFORK)  # Linux would copy it for each process that loads data
        with contextlib.suppress(OSError):  # not every kernel has them
            self.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self, dtype=torch.uint8)
        whole.zero_()  # by all threads; CUDA would get each page from Linux by one, which takes five times as long
        address = whole.data_ptr()
        cuda: Any = torch.cuda.cudart()
        if error := int(cuda.cudaHostRegister(address, size, 0)):
            message = f"CUDA cannot pin {size / 2**30:.2f} GiB more of main memory for the optimizer's state"
            raise RunError(f"{message} (error {error})")
        self.address = address
        return self

    def __del__(self) -> None:
        if self.address is not None and not sys.is_finalizing():
            cuda: Any = torch.cuda.cudart()
            cuda.cudaHostUnregister(self.address)
