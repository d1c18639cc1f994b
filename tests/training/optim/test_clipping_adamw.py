"""AdamW that clips in its step, against PyTorch's AdamW in float64 on clipped gradients.

The cases of a kernel: pytest -m gpu, or TRITON_INTERPRET=1 pytest where Triton is installed.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fiddlehead.training.distributed.gradients import clip
from fiddlehead.training.optim.bfloat16_adamw import BFloat16AdamW
from fiddlehead.training.optim.clipping_adamw import ClippingAdamW
from tests.training.ranks import on_ranks
from tests.triton_kernels import NEEDS_KERNELS

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZES = [(40, 30), (7,), (129, 65)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def parameters(device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).bfloat16().to(device, dtype)) for size in SIZES]


def take_steps(optimizer: Any, parameters: list[nn.Parameter], steps: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.device, p.dtype)
        norms.append(clip({str(i): p.grad for i, p in enumerate(parameters)}, 5.0, None, optimizer))  # type: ignore[misc]
        optimizer.step()
    return norms


def error(found: list[nn.Parameter], exact: list[nn.Parameter]) -> float:
    pairs = [(a.detach().double().cpu(), b.detach()) for a, b in zip(found, exact, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_adamw_on_clipped_gradients(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    exact = parameters("cpu", torch.float64)
    norms = take_steps(torch.optim.AdamW(exact, **SETTINGS), exact, 20)
    ours, theirs = parameters(device, torch.float32), parameters(device, torch.float32)
    found = take_steps(ClippingAdamW(ours, **SETTINGS), ours, 20)
    take_steps(torch.optim.AdamW(theirs, **SETTINGS, fused=True), theirs, 20)
    assert [float(norm) for norm in found] == pytest.approx([float(norm) for norm in norms])
    assert error(ours, exact) < 1.5 * error(theirs, exact)


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_gradients_of_some_parameters_are_as_if_in_float32(device: str, clips: bool) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    ends, norms = [], []
    for narrow in (True, False):
        generator = torch.Generator().manual_seed(1)
        trained = parameters(device, torch.float32)
        optimizer = ClippingAdamW(trained, **SETTINGS)
        for _ in range(4):
            for p in trained:
                gradient = torch.randn(p.shape, generator=generator).bfloat16().to(device)
                p.grad_dtype = None
                p.grad = gradient if narrow and p.dim() == 2 else gradient.float()
            named = {str(i): p.grad for i, p in enumerate(trained) if p.grad is not None}
            norms.append(float(clip(named, 5.0 if clips else math.inf, None, optimizer)))
            optimizer.step()
        ends.append(trained)
    assert norms[:4] == norms[4:]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_factor_holds_for_one_step(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for kind, dtype in ((ClippingAdamW, torch.float32), (BFloat16AdamW, torch.bfloat16)):
        ours = parameters(device, dtype)
        optimizer = kind(ours, **SETTINGS)
        take_steps(optimizer, ours, 1)
        assert optimizer.gradient_factor is None


@pytest.mark.parametrize("device", DEVICES)
def test_its_state_is_pytorchs(device: str) -> None:
    """Each goes on from the other's checkpoint to the same weights, up to rounding; its own bit for bit."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    ends = []
    for first, second in ((ClippingAdamW, torch.optim.AdamW), (torch.optim.AdamW, ClippingAdamW)) + 2 * (
        (ClippingAdamW, ClippingAdamW),
    ):
        trained = parameters(device, torch.float32)
        fused = {"fused": True}
        optimizer = first(trained, **SETTINGS, **(fused if first is torch.optim.AdamW else {}))
        take_steps(optimizer, trained, 5)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = second(trained, **SETTINGS, **(fused if second is torch.optim.AdamW else {}))
        optimizer.load_state_dict(state)
        take_steps(optimizer, trained, 5, seed=2)
        ends.append(trained)
    for a, b, c, d in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6) and torch.allclose(a, c, rtol=1e-5, atol=1e-6)
        assert torch.equal(c, d)


def test_a_bfloat16_step_clips_too() -> None:
    clipped, scaled = parameters("cpu", torch.bfloat16), parameters("cpu", torch.bfloat16)
    take_steps(BFloat16AdamW(clipped, **SETTINGS), clipped, 3)
    generator, optimizer = torch.Generator().manual_seed(1), BFloat16AdamW(scaled, **SETTINGS)
    for _ in range(3):
        for p in scaled:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        norm = torch.cat([p.grad.float().flatten() for p in scaled if p.grad is not None]).norm()
        optimizer.gradient_factor = 5.0 / (norm + 1e-6)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(clipped, scaled, strict=True))


@pytest.mark.gpu
@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2048, 5001])
def test_the_kernel_is_the_same_arithmetic(n: int, dtype: torch.dtype) -> None:
    from fiddlehead.training.optim import adamw_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(n)
    weight, gradient = (torch.randn(n, device=device).to(dtype) for _ in range(2))
    exp_avg, exp_avg_sq = torch.randn(n, device=device) * 0.1, torch.rand(n, device=device) * 0.01
    low = torch.randint(-(2**15), 2**15, (n,), device=device).to(torch.int16).view(torch.bfloat16)
    scalars = torch.tensor([0.5, 1e-4, 1e-2, 0.3], device=device)

    def whole(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        if dtype == torch.float32:
            return weight
        return ((weight.view(torch.int16).int() << 16) + low.view(torch.int16).int()).view(torch.float32)

    g = gradient.double() * 0.5
    m, v = 0.9 * exp_avg.double() + 0.1 * g, 0.95 * exp_avg_sq.double() + 0.05 * g * g
    before = whole(weight, low).double()
    exact = before - scalars[1].double() * before - scalars[2].double() * m / (v.sqrt() / scalars[3].double() + 1e-8)
    halves = low if dtype == torch.bfloat16 else None
    adamw_kernel.update_weight(weight, gradient, halves, exp_avg, exp_avg_sq, scalars, 0.9, 0.95, 1e-8)
    for found, expected in ((whole(weight, low), exact), (exp_avg, m), (exp_avg_sq, v)):
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=3e-7)
    if dtype == torch.bfloat16:
        # Of two that are equally near it takes another than PyTorch, as the lower half would not fit in 16 bits.
        full = whole(weight, low)
        assert torch.equal((weight.float() - full).abs(), (full.bfloat16().float() - full).abs())


def plain_update(
    weight: Any, gradient: Any, low_bits: None, exp_avg: Any, exp_avg_sq: Any, scalars: Any, *others: float
) -> None:
    """What the kernel computes for float32 parameters, in PyTorch's operations."""
    (factor, decay, step_size, correction), (beta1, beta2, eps) = scalars.tolist(), others
    gradient = gradient * factor
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weight.mul_(1 - decay).addcdiv_(exp_avg, exp_avg_sq.sqrt() / correction + eps, value=-step_size)


def errors_of_shards() -> list[float]:
    """FSDP2 shards of two ranks, also uneven and empty ones, in the way of a GPU; the states are saved and loaded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    exact = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    ours, theirs = ClippingAdamW(model.parameters(), **SETTINGS), torch.optim.AdamW(exact.parameters(), **SETTINGS)
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for each in (model, exact):
            each.zero_grad()
            each(x).square().mean().backward()
        for p in exact.parameters():
            p.grad *= 0.5  # type: ignore[operator]
        theirs.step()
        with torch.no_grad():
            ours.take(ours._updates(ours.param_groups[0], list(model.parameters()), torch.tensor(0.5)), plain_update)
        if step == 1:
            saved, ours = ours.state_dict(), ClippingAdamW(model.parameters(), **SETTINGS)
            ours.load_state_dict(saved)
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    return [float((p.full_tensor() - other).norm() / other.norm()) for p, other in pairs]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_shards_are_stepped_as_whole_parameters_are() -> None:
    for errors in on_ranks(2, errors_of_shards):
        assert len(errors) == 4 and max(errors) < 1e-6


def test_the_hooks_of_a_step_run_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # which makes PyTorch call hooks in AdamW's own step
    ours = parameters("cpu", torch.float32)
    optimizer, calls = ClippingAdamW(ours, **SETTINGS), []
    optimizer.register_step_post_hook(lambda *arguments: calls.append(1))
    take_steps(optimizer, ours, 3)
    assert len(calls) == 3
