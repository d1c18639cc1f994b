"""AdamW on the upper halves of float32 weights, against PyTorch's in float64."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fiddlehead.training.bfloat16_adamw import BFloat16AdamW

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def whole(parameter: nn.Parameter, optimizer: BFloat16AdamW) -> torch.Tensor:
    high = parameter.detach().view(torch.int16).to(torch.int32) << 16
    return (high + optimizer.state[parameter]["low_bits"].to(torch.int32)).view(torch.float32)


def trained(steps: int, saved_at: int | None = None) -> tuple[torch.Tensor, nn.Parameter, torch.Tensor]:
    """The weights of ours, our parameter, and PyTorch's weights, after as many steps."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=generator).bfloat16()
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.double())
    ours, theirs = BFloat16AdamW([narrow], **SETTINGS), torch.optim.AdamW([wide], **SETTINGS)
    for step in range(steps):
        gradient = torch.randn(40, 30, generator=generator).bfloat16()
        narrow.grad, wide.grad = gradient, gradient.double()
        ours.step()
        theirs.step()
        if step == saved_at:
            state = copy.deepcopy(ours.state_dict())
            ours = BFloat16AdamW([narrow], **SETTINGS)
            ours.load_state_dict(state)
    return whole(narrow, ours), narrow, wide.detach()


def test_the_weights_are_those_of_float64_to_float32s_precision() -> None:
    ours, parameter, theirs = trained(100)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    assert torch.equal(parameter.detach(), ours.bfloat16())


def test_plain_bfloat16_would_not_have_moved() -> None:
    """The steps are below half of what a bfloat16 near 1 can express."""
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    lost = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    ours = BFloat16AdamW([parameter], lr=1e-3, weight_decay=0.0)
    theirs = torch.optim.AdamW([lost], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        parameter.grad, lost.grad = torch.ones_like(parameter), torch.ones_like(lost)
        ours.step()
        theirs.step()
    assert torch.equal(lost.detach(), torch.ones_like(lost))
    assert torch.allclose(parameter.detach().float(), torch.full((8,), 0.98), atol=0.004)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    assert torch.equal(trained(20)[0], trained(20, saved_at=9)[0])
