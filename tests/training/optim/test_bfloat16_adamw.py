"""AdamW on the upper halves of float32 weights, against PyTorch's AdamW in float64."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fiddlehead.training.optim.bfloat16_adamw import BFloat16AdamW

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def whole(parameter: nn.Parameter, optimizer: BFloat16AdamW) -> torch.Tensor:
    high = parameter.detach().view(torch.int16).to(torch.int32) << 16
    return (high + optimizer.state[parameter]["low_bits"].view(torch.int16).to(torch.int32)).view(torch.float32)


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 30, generator=generator).bfloat16() for _ in range(steps)]


def start() -> torch.Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).bfloat16()


def ours(steps: int, saved_at: int | None = None) -> tuple[torch.Tensor, nn.Parameter]:
    """The weights and the parameter after as many steps."""
    parameter = nn.Parameter(start())
    optimizer = BFloat16AdamW([parameter], **SETTINGS)
    for step, gradient in enumerate(gradients(steps)):
        parameter.grad = gradient
        optimizer.step()
        if step == saved_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = BFloat16AdamW([parameter], **SETTINGS)
            optimizer.load_state_dict(state)
    return whole(parameter, optimizer), parameter


def pytorchs(steps: int, dtype: torch.dtype) -> torch.Tensor:
    parameter = nn.Parameter(start().to(dtype))
    optimizer = torch.optim.AdamW([parameter], **SETTINGS)
    for gradient in gradients(steps):
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    return parameter.detach()


def test_the_weights_are_as_exact_as_those_of_float32() -> None:
    weights, parameter = ours(100)
    exact = pytorchs(100, torch.float64)
    assert (weights - exact).norm() < 1.2 * (pytorchs(100, torch.float32) - exact).norm()
    assert torch.equal(parameter.detach(), weights.bfloat16())


def test_plain_bfloat16_would_not_have_moved() -> None:
    """The steps are below half of what a bfloat16 near 1 can express."""
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    lost = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = BFloat16AdamW([parameter], lr=1e-3, weight_decay=0.0)
    theirs = torch.optim.AdamW([lost], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        parameter.grad, lost.grad = torch.ones_like(parameter), torch.ones_like(lost)
        optimizer.step()
        theirs.step()
    assert torch.equal(lost.detach(), torch.ones_like(lost))
    assert torch.allclose(parameter.detach().float(), torch.full((8,), 0.98), atol=0.004)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    assert torch.equal(ours(20)[0], ours(20, saved_at=9)[0])
