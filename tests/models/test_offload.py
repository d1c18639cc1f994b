"""What a layer keeps for its backward pass may be in main memory in between; it comes back as it was, and in time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from fiddlehead.models.computation import Computation
from fiddlehead.models.offload import HostMemory, Kept
from fiddlehead.models.speed import offload_inputs
from tests.models.test_tiles import error, learned, made


@pytest.mark.parametrize("tokens", [None, 5])
def test_a_model_whose_inputs_are_moved_learns_the_same(tokens: int | None) -> None:
    moved: list[torch.Size] = []
    model = made(tokens, "full").double()
    memory = HostMemory(lambda x: moved.append(x.shape) is None)
    for layer in model.layers:
        layer.forward = memory.keeping_input(layer.forward)
    assert max(error(learned(model), learned(made().double())).values()) < 1e-12
    assert moved == 2 * [torch.Size([2, 17, 32])]


@pytest.mark.parametrize("tokens", [None, 5])
def test_what_is_moved_is_freed(tokens: int | None) -> None:
    model = made(tokens, "full")
    memory, inputs = HostMemory(lambda x: True), []
    for layer in model.layers:
        moves = memory.keeping_input(layer.forward)
        layer.forward = lambda x, *others, moves=moves: (inputs.append(weakref.ref(x)), moves(x, *others))[1]
    hidden = model.hidden(torch.zeros(2, 17, dtype=torch.int64))
    assert [x() for x in inputs] == [None, None]
    hidden.sum().backward()


def test_the_input_that_is_needed_next_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, started = HostMemory(lambda x: True), []
    start = Kept.start_back
    monkeypatch.setattr(Kept, "start_back", lambda self: (started.append(self), start(self))[1])
    tensors = [torch.randn(3, 4) for _ in range(3)]
    first, second, third = kept = [memory.keep(x) for x in tensors]
    copies = [x.clone() for x in tensors]
    for x in tensors:
        x.zero_()  # as if others had its memory now
    assert isinstance(third, Kept) and torch.equal(third.back(), copies[2]) and started == [third, second]
    assert all(isinstance(each, Kept) and torch.equal(each.back(), x) for each, x in zip(kept, copies, strict=True))
    started.clear()
    del first, second, third, kept
    alone = memory.keep(torch.ones(1))
    assert isinstance(alone, Kept) and torch.equal(alone.back(), torch.ones(1)) and started == [alone]


def test_on_a_cpu_nothing_is_moved() -> None:
    x = torch.ones(2)
    assert HostMemory().keep(x) is x
    model = made(5, "full")
    offload_inputs(model)
    assert max(error(learned(model), learned(made(5, "full"))).values()) == 0


def test_impossible_offloading_is_named() -> None:
    def said(compile: Any, recompute: Any, tiled_mlp: Any, offloads: Any = True) -> list[str]:
        computation = Computation(compile, recompute, tiled_mlp=tiled_mlp, activation_offloading=offloads)
        return [str(problem) for problem in computation.problems()]

    assert said("layers", "full", 8) == said(None, "full", None) == said("model", 0.5, None, False) == []
    for given, word in (
        ((None, None, None), "='full'"),
        (("layers", "full", None), "set tiled_mlp"),
        ((None, "full", None, 1), "True or"),
    ):
        (problem,) = said(*given)
        assert problem.startswith("activation_offloading=") and word in problem
