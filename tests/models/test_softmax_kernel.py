"""The kernel for the softmax of the loss, against float64 and PyTorch's operations.

pytest -m gpu tests/models/test_softmax_kernel.py
TRITON_INTERPRET=1 pytest tests/models/test_softmax_kernel.py     without a GPU, where Triton is installed
"""

from __future__ import annotations

import pytest
import torch

from fiddlehead.models.linear_cross_entropy import linear_cross_entropy, nats_and_gradient
from tests.triton_kernels import DEVICE, DTYPES, NEEDS_KERNELS

pytestmark = [pytest.mark.gpu, NEEDS_KERNELS]
ONE = torch.ones((), device=DEVICE)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [7, 8192, 8193, 32_001])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 30.0), (0.5, 5.0)])
def test_it_is_as_exact_as_pytorch(V: int, dtype: torch.dtype, scale: float, cap: float | None) -> None:
    from fiddlehead.models.softmax_kernel import nats_and_gradient_

    torch.manual_seed(V)
    logits = (torch.randn(9, V, device=DEVICE) * 6).to(dtype)
    labels = torch.randint(V, (9,), device=DEVICE)
    labels[0], labels[1], labels[4], labels[8] = 0, V - 1, -100, -100
    logits[3, labels[3]] = 50  # a label that is almost certain
    exact = nats_and_gradient(logits.double(), labels, scale, cap, -100, ONE)
    theirs = nats_and_gradient(logits, labels, scale, cap, -100, ONE)
    nats, gradient = nats_and_gradient_(logits, labels, scale, cap, -100, ONE)
    assert gradient.data_ptr() == logits.data_ptr()
    assert error(nats, exact[0]) < max(2e-7, 2 * error(theirs[0], exact[0]))
    assert error(gradient, exact[1]) < 2 * error(theirs[1], exact[1]) + 1e-7
    assert not gradient[labels == -100].any()


def test_logits_far_from_0_have_a_loss_and_a_gradient_too() -> None:
    from fiddlehead.models.softmax_kernel import nats_and_gradient_

    for offset in (-1e4, 1e4):
        torch.manual_seed(0)
        logits, labels = torch.randn(6, 40, device=DEVICE) * 8 + offset, torch.randint(40, (6,), device=DEVICE)
        exact = nats_and_gradient(logits.double(), labels, 1.0, None, -100, ONE)
        nats, gradient = nats_and_gradient_(logits, labels, 1.0, None, -100, ONE)
        assert error(nats, exact[0]) < 2e-3
        assert error(gradient, exact[1]) < 2e-3


@pytest.mark.parametrize("wrong", [-1, 40])
def test_a_label_outside_of_the_vocabulary_has_no_loss(wrong: int) -> None:
    from fiddlehead.models.softmax_kernel import nats_and_gradient_

    labels = torch.tensor([3, wrong], device=DEVICE)
    assert nats_and_gradient_(torch.randn(2, 40, device=DEVICE), labels, 1.0, None, -100, ONE)[0].isnan()


def test_a_logit_that_is_no_number_leaves_no_loss() -> None:
    from fiddlehead.models.softmax_kernel import nats_and_gradient_

    for bad in (float("nan"), float("inf")):
        logits = torch.randn(2, 40, device=DEVICE)
        logits[1, 7] = bad
        assert not nats_and_gradient_(logits, torch.tensor([3, 4], device=DEVICE), 1.0, None, -100, ONE)[0].isfinite()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_loss_takes_it_on_a_gpu_and_is_the_same_each_time() -> None:
    torch.manual_seed(0)
    x = torch.randn(5000, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1001, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(1001, (5000,), device=DEVICE)

    def found(compiled: bool) -> list[torch.Tensor]:
        loss = linear_cross_entropy(x, weight, labels, compiled=compiled)
        return [loss, *torch.autograd.grad(loss / 3, (x, weight))]

    for mine, again, plain in zip(found(True), found(True), found(False), strict=True):
        assert torch.equal(mine, again)
        assert error(mine, plain.double()) < 4e-3
