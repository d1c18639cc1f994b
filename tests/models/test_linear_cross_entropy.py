"""The loss in chunks of logits, against PyTorch's cross-entropy of all logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode

from fiddlehead.models import linear_cross_entropy as module
from fiddlehead.models.linear_cross_entropy import linear_cross_entropy, nats_and_gradient

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
ONE = torch.ones(())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 16)


def operands(dtype: torch.dtype, tokens: int = 50) -> Operands:
    torch.manual_seed(0)
    x = torch.randn(tokens, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(37, (tokens,))
    labels[::7] = -100
    return x, weight, labels


def all_logits(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, cap: float | None):
    logits = F.linear(x.double(), weight.double()) * scale
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), labels, reduction="sum")


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_are_those_of_all_logits(
    dtype: torch.dtype, close: float, scale: float, cap: float | None
) -> None:
    x, weight, labels = operands(dtype)
    ours = linear_cross_entropy(x, weight, labels, scale=scale, softcap=cap)
    theirs = all_logits(x, weight, labels, scale, cap)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=close)
    for mine, other in zip(
        torch.autograd.grad(ours / 3, (x, weight)), torch.autograd.grad(theirs / 3, (x, weight)), strict=True
    ):
        assert mine.dtype == dtype
        assert float((mine.double() - other.double()).norm() / other.double().norm()) < close


def test_a_chunk_is_gone_before_the_next_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def watched(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert all(gradient() is None for gradient in made), "the gradient of an earlier chunk is still in memory"
        nats, gradient = nats_and_gradient(*arguments)
        made.append(weakref.ref(gradient))
        return nats, gradient

    monkeypatch.setattr(module, "nats_and_gradient", watched)
    linear_cross_entropy(*operands(torch.bfloat16))
    assert len(made) == 4


def test_the_gradients_may_be_computed_in_two_passes_as_zero_bubble_pipelines_do() -> None:
    """Before torch 2.13, the second pass cannot begin at a function of Python's."""
    x, weight, labels = operands(torch.float64)
    parameter = torch.nn.Parameter(weight.detach())
    loss = torch.stack([linear_cross_entropy(x, parameter, labels)]).sum() / 3
    (grad_x,), groups = stage_backward_input([loss], None, [x], iter([parameter]))
    assert parameter.grad is None
    del loss
    stage_backward_weight(iter([parameter]), groups)
    exact = torch.autograd.grad(all_logits(x, weight, labels, 1.0, None) / 3, (x, weight))
    assert grad_x is not None and parameter.grad is not None
    torch.testing.assert_close((grad_x, parameter.grad), exact)


@pytest.mark.parametrize(("factor", "operations"), [(1, []), (0.25, ["aten.mul_.Tensor"])])
def test_the_backward_pass_makes_nothing_as_large_as_the_weight(factor: float, operations: list[str]) -> None:
    """Not even zeros: its gradient is there already. Where the gradient that arrives is 1, it stays as it is."""
    x, weight, labels = operands(torch.float32)
    loss = linear_cross_entropy(x, weight, labels, divisor=3) * factor
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == weight.shape:
                made.append(str(func))
            return result

    with Watch():
        torch.autograd.grad(loss, (x, weight))
    assert made == operations


@pytest.mark.parametrize("factor", [1.0, 7.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("dtype", "close", "compiled"),
    [
        (torch.float64, 1e-12, False),
        (torch.float32, 2e-6, False),
        (torch.bfloat16, 1e-2, False),
        (torch.float32, 2e-6, True),
    ],
)
def test_a_divisor_makes_a_mean_with_its_gradients(
    dtype: torch.dtype, close: float, as_tensor: bool, factor: float, compiled: bool
) -> None:
    """Whatever the gradient is that arrives, and also where it is a divisor's that came later."""
    x, weight, labels = operands(dtype)
    labelled = int((labels != -100).sum())
    divisor = torch.tensor(float(labelled)) if as_tensor else labelled
    ours = linear_cross_entropy(x, weight, labels, scale=0.5, softcap=3.0, divisor=divisor, compiled=compiled) * factor
    theirs = all_logits(x, weight, labels, 0.5, 3.0) * factor / labelled
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=close)
    exact = torch.autograd.grad(theirs, (x, weight))
    for mine, other in zip(torch.autograd.grad(ours, (x, weight)), exact, strict=True):
        assert mine.dtype == dtype
        assert float((mine.double() - other.double()).norm() / other.double().norm()) < close


def test_the_gradients_are_given_once() -> None:
    """They are multiplied in place, so a second backward pass fails rather than returns a wrong gradient."""
    x, weight, labels = operands(torch.float32)
    loss = linear_cross_entropy(x, weight, labels) * 3
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, labels = operands(torch.float32)
    linear_cross_entropy(x, weight.requires_grad_(False), labels).backward()
    assert x.grad is not None
    assert weight.grad is None


def test_without_gradients_there_is_the_loss_alone() -> None:
    x, weight, labels = operands(torch.float64)
    with torch.no_grad():
        assert float(linear_cross_entropy(x, weight, labels)) == pytest.approx(
            float(all_logits(x, weight, labels, 1.0, None))
        )


def test_a_label_that_is_almost_certain_keeps_its_gradient_in_bfloat16() -> None:
    """p - 1 in bfloat16 would be 0 where p is above 0.998."""
    logits = torch.tensor([[10.0, 2.5]], dtype=torch.bfloat16)
    _, gradient = nats_and_gradient(logits, torch.tensor([0]), 1.0, None, -100, ONE)
    exact = -torch.tensor(-7.5, dtype=torch.float64).exp() / (1 + torch.tensor(-7.5, dtype=torch.float64).exp())
    assert float(gradient[0, 0]) == pytest.approx(float(exact), rel=1e-2)


@pytest.mark.parametrize(("offset", "close"), [(-1e4, 2e-3), (0.0, 2e-6), (1e4, 2e-3)])
def test_logits_far_from_0_have_a_loss_and_a_gradient_too(offset: float, close: float) -> None:
    """As close as their own rounding to float32."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 40) * 8 + offset, torch.randint(40, (6,))
    nats, gradient = nats_and_gradient(logits, labels, 1.0, None, -100, ONE)
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, exact)
    assert float(nats) == pytest.approx(float(loss.detach()), rel=close)
    assert float((gradient - expected).norm() / expected.norm()) < close


def test_a_label_whose_probability_rounds_to_0_has_its_loss() -> None:
    logits = torch.tensor([[0.0, 500.0, 499.0], [3.0, -400.0, 3.0]])
    nats, gradient = nats_and_gradient(logits, torch.tensor([0, 1]), 1.0, None, -100, ONE)
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, torch.tensor([0, 1]), reduction="sum")
    (expected,) = torch.autograd.grad(loss, exact)
    assert float(nats) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-30)


def test_autocast_makes_the_products_narrow_and_the_gradients_wide() -> None:
    x, weight, labels = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    exact = all_logits(x, weight, labels, 1.0, None)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-2)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(exact, weight)
    assert float((weight.grad - expected).norm() / expected.norm()) < 1e-2


def test_gradients_that_were_given_out_are_not_changed_by_a_second_backward_pass() -> None:
    x, weight = (torch.randn(size, 4, requires_grad=True) for size in (6, 9))
    loss = linear_cross_entropy(x, weight, torch.arange(6))
    given = torch.autograd.grad(loss, (x, weight), retain_graph=True)  # by a factor of 1
    before = [each.clone() for each in given]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(3 * loss, (x, weight))
    assert all(torch.equal(*each) for each in zip(given, before, strict=True))
