"""An AdamW with its state in main memory: bit for bit the one that has it on the device."""

from __future__ import annotations

import copy
import random
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fiddlehead.errors import ConfigError
from fiddlehead.training.distributed.gradients import clip
from fiddlehead.training.optim import AdamW
from fiddlehead.training.optim.bfloat16_adamw import BFloat16AdamW, OffloadedBFloat16AdamW, update_weight
from fiddlehead.training.optim.clipping_adamw import ClippingAdamW, OffloadedClippingAdamW
from fiddlehead.training.optim.offloaded import PIECE, PIECES
from tests.training.ranks import on_ranks

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZES = [(40, 30), (0,), (7,), (129, 65), (1,), (3, 5)]
NO_GRADIENT = 4
"""The number of the parameter that has no gradient."""
KINDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.bfloat16: (BFloat16AdamW, OffloadedBFloat16AdamW),
    torch.float32: (ClippingAdamW, OffloadedClippingAdamW),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def plain_update(
    weight: Any, gradient: Any, low_bits: None, exp_avg: Any, exp_avg_sq: Any, scalars: Any, *others: float
) -> None:
    """What the kernel computes for float32 parameters; each operation rounds alike at every place of a tensor."""
    (factor, decay, step_size, correction), (beta1, beta2, eps) = scalars, others
    gradient = gradient * factor
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * gradient)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient)
    weight.copy_(weight - decay * weight - step_size * exp_avg / (exp_avg_sq.sqrt() / correction + eps))


@pytest.fixture(autouse=True)
def kernel_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, `ClippingAdamW` takes the way of a GPU with another kernel."""
    if not torch.cuda.is_available():
        replace_kernel(monkeypatch.setitem)
        monkeypatch.setattr(ClippingAdamW, "_by_kernel", lambda self, parameters: True)


def replace_kernel(setitem: Callable[..., None] = dict.__setitem__) -> None:
    setitem(sys.modules, "fiddlehead.training.optim.adamw_kernel", types.SimpleNamespace(update_weight=plain_update))


def need(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def parameters(device: str, dtype: torch.dtype, sizes: Sequence[tuple[int, ...]] = SIZES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).bfloat16().to(device, dtype)) for size in sizes]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return AdamW(weight_decay=0.1).groups(parameters)


def take_steps(optimizer: Any, parameters: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for number, p in enumerate(parameters):
            gradient = torch.randn(p.shape, generator=generator).bfloat16().to(p.device, p.dtype)
            p.grad = None if number == NO_GRADIENT else gradient
        if step != 1:  # with a factor, and without
            clip({str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}, 5.0, None, optimizer)
        optimizer.step()


def same(one: Any, other: Any) -> bool:
    """Whether values are equal bit for bit, and of the same types."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        bits = (x.detach().cpu().contiguous().flatten().view(torch.uint8) for x in (one, other))
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("piece", [7, 1024, 2**24])
def test_the_steps_are_those_of_a_state_on_the_device(dtype: torch.dtype, piece: int, device: str) -> None:
    need(device)
    plain, offloaded = KINDS[dtype]
    found, expected = parameters(device, dtype), parameters(device, dtype)
    optimizer, reference = offloaded(groups(found), **SETTINGS), plain(groups(expected), **SETTINGS)
    optimizer.piece = piece
    for seed in range(3):
        take_steps(optimizer, found, 2, seed)
        take_steps(reference, expected, 2, seed)
        assert same(found, expected) and optimizer.gradient_factor is None
    saved = optimizer.state_dict()
    assert len(saved["state"]) == len(SIZES) - 1 and same(saved, reference.state_dict())
    assert not optimizer.state
    kept = [x for values in saved["state"].values() for name, x in values.items() if name != "step"]
    assert {x.device.type for x in kept} == {"cpu"}
    assert device == "cpu" or all(x.is_pinned() for x in kept if x.numel())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", KINDS)
def test_a_run_may_go_on_with_its_state_elsewhere(dtype: torch.dtype, device: str) -> None:
    need(device)
    plain, offloaded = KINDS[dtype]
    ends = []
    for first, second in ((plain, plain), (plain, offloaded), (offloaded, plain), (offloaded, offloaded)):
        trained = parameters(device, dtype)
        optimizer = first(groups(trained), **SETTINGS)
        take_steps(optimizer, trained, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = second(groups(trained), **SETTINGS)
        optimizer.load_state_dict(saved)
        assert bool(saved["state"]) == (second is plain)  # there may be no room for it twice
        take_steps(optimizer, trained, 3, seed=2)
        ends.append((trained, optimizer.state_dict()))
    assert all(same(end, ends[0]) for end in ends[1:])


class Queues:
    """Streams that do their work late, and in any order that their events allow."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams = [Queue(self) for _ in range(3)]

    def finish(self) -> None:
        while waiting := [stream for stream in self.streams if stream.runnable()]:
            self.random.choice(waiting).run()
        assert not any(stream.work for stream in self.streams)


class Queue(TorchDispatchMode):
    """One of them: copies that are made within it wait; so does what `add` is given."""

    def __init__(self, all_: Queues) -> None:
        super().__init__()
        self.all, self.work, self.added, self.done = all_, [], 0, 0

    def add(self, work: Callable[[], Any] | tuple[Queue, int]) -> None:
        self.work.append(work)
        self.added += 1

    def runnable(self) -> bool:
        if not self.work:
            return False
        first = self.work[0]
        return not isinstance(first, tuple) or first[0].done >= first[1]

    def run(self) -> None:
        work = self.work.pop(0)
        self.done += 1
        if not isinstance(work, tuple):
            work()

    def record_event(self) -> tuple[Queue, int]:
        return self, self.added

    def wait_event(self, event: tuple[Queue, int]) -> None:
        self.add(event)

    def wait_stream(self, stream: Queue) -> None:
        self.add(stream.record_event())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self.add(lambda: args[0].copy_(args[1]))
        return args[0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("piece", [100, 1000])
@pytest.mark.parametrize("sizes", [SIZES, [(40, 30)]])
def test_copies_and_computation_are_in_order_however_streams_run(
    sizes: list[tuple[int, ...]], piece: int, seed: int
) -> None:
    found, expected = (parameters("cpu", torch.bfloat16, sizes) for _ in range(2))
    optimizer = OffloadedBFloat16AdamW(groups(found), **SETTINGS)
    reference = BFloat16AdamW(groups(expected), **SETTINGS)
    optimizer.piece, queues = piece, Queues(seed)
    optimizer._streams_of = lambda device: tuple(queues.streams)  # type: ignore[method-assign]
    through = optimizer._through_device
    now = queues.streams[0]

    def take(updates: Any, update: Any) -> None:
        for each in through(updates):
            now.add(lambda each=each: update_weight(*each))

    optimizer.take = take  # type: ignore[method-assign]
    for step in range(3):  # the host is ahead of the device by whole steps
        take_steps(optimizer, found, 1, seed=step)
        take_steps(reference, expected, 1, seed=step)
    queues.finish()
    assert same(found, expected) and same(optimizer.state_dict(), reference.state_dict())


def states_of_shards() -> list[bool]:
    """FSDP2 shards of two ranks, also uneven and empty ones, against those with their state on the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    replace_kernel()
    ClippingAdamW._by_kernel = lambda self, parameters: True  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    found = []
    for dtype, (plain, offloaded) in KINDS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)).to(dtype)
        other = copy.deepcopy(model)
        for each in (model, other):
            fully_shard(each, mesh=init_device_mesh("cpu", (2,)))
        ours, theirs = offloaded(model.parameters(), **SETTINGS), plain(other.parameters(), **SETTINGS)
        ours.piece = 4
        for step in range(4):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
            for each, optimizer in ((model, ours), (other, theirs)):
                each.zero_grad()
                each(x).square().mean().backward()
                optimizer.gradient_factor = torch.tensor(0.5)
                optimizer.step()
            if step == 1:
                saved, ours = theirs.state_dict(), offloaded(model.parameters(), **SETTINGS)
                ours.load_state_dict(copy.deepcopy(saved))
        mine, reference = ours.state_dict()["state"], theirs.state_dict()["state"]
        for number, values in reference.items():
            for name, value in values.items():
                own = mine[number][name]
                if isinstance(value, DTensor):
                    found += [isinstance(own, DTensor) and own.placements == value.placements]
                    found += [same(own.to_local(), value.to_local()), same(own.full_tensor(), value.full_tensor())]
                else:
                    found += [same(own, value)]
        found += [same(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), other.parameters(), strict=True)]  # type: ignore[attr-defined]
    return found


@pytest.mark.slow
def test_shards_have_their_state_in_main_memory_as_on_the_device() -> None:
    for found in on_ranks(2, states_of_shards):
        assert len(found) > 40 and all(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", KINDS)
def test_pieces_of_the_state_are_all_that_is_on_a_gpu(dtype: torch.dtype) -> None:
    plain, offloaded = KINDS[dtype]
    ends, large = [], [(3 * PIECE + 5,), (4099, 1021), (33,)]
    for kind in (plain, offloaded):
        trained = parameters("cuda", dtype, large)
        for p in trained:
            p.grad = torch.randn_like(p, generator=torch.Generator("cuda").manual_seed(p.numel()))
        settings = AdamW(lr=1e-2, state_offloading=kind is offloaded)
        optimizer = settings.optimizer([(str(number), p) for number, p in enumerate(trained)])
        assert type(optimizer) is kind
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            optimizer.step()
        ends.append((trained, optimizer.state_dict()["state"]))
    named = [(str(number), p) for number, p in enumerate(trained)]
    most = settings.step_bytes(named, "bf16-true" if dtype == torch.bfloat16 else "bf16-mixed")
    assert most == PIECES * PIECE * (10 if dtype == torch.bfloat16 else 8)
    assert 0 < torch.cuda.max_memory_allocated() - before - most < 2**20
    assert torch.cuda.memory_allocated() - before < 2**20
    assert same(ends[0], ends[1])


def test_on_a_cpu_nothing_changes() -> None:
    for dtype, (plain, _) in KINDS.items():
        named = [(str(number), p) for number, p in enumerate(parameters("cpu", dtype))]
        assert type(AdamW(state_offloading=True).optimizer(named)) is plain


def test_what_cannot_be_offloaded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^state_offloading=True: moments of state_bits=8 stay on the GPU"):
        AdamW(state_offloading=True, state_bits=8)
    with pytest.raises(ConfigError, match=r"^state_offloading='cpu': must be True or False"):
        AdamW(state_offloading="cpu")  # type: ignore[arg-type]
    both = [(str(dtype), nn.Parameter(torch.zeros(2, dtype=dtype))) for dtype in (torch.float32, torch.bfloat16)]
    with pytest.raises(ConfigError, match=r"the parameters are bfloat16, float32; must be all float32 or all bfloat16"):
        AdamW(state_offloading=True).optimizer(both)
