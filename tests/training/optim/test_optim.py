"""Schedules at their corner points, and the parameters with weight decay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fiddlehead.errors import ConfigError
from fiddlehead.training import AdamW, CosineAnnealing, WarmupStableDecay
from fiddlehead.training.optim import Schedule

LR = 0.5


def factors(schedule: Schedule, max_steps: int) -> list[float]:
    """The factor of each step, and what one more step would have."""
    return [schedule(step, max_steps, LR) for step in range(max_steps + 1)]


def test_cosine_warms_up_to_the_peak_and_ends_at_the_floor() -> None:
    found = factors(CosineAnnealing(warmup_steps=4, min_lr=0.05), 14)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[9] == pytest.approx((1 + 0.1) / 2)  # half-way between peak and floor
    assert found[14] == pytest.approx(0.1)


def test_stable_is_stable_and_the_decay_is_linear() -> None:
    found = factors(WarmupStableDecay(warmup_steps=2, decay_fraction=0.4, min_lr=0.1), 10)
    assert found[:7] == [0.5, 1, 1, 1, 1, 1, 1]
    assert found[7:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", [CosineAnnealing(), WarmupStableDecay()])
def test_without_warm_up_the_first_step_has_the_peak(schedule: Schedule) -> None:
    assert factors(schedule, 5)[0] == 1


def test_without_decay_the_rate_stays() -> None:
    assert factors(WarmupStableDecay(decay_fraction=0, min_lr=0.1), 5) == [1] * 6


def test_a_shorter_run_still_ends_in_a_decay() -> None:
    """Also one that ends in its warm-up."""
    schedule = WarmupStableDecay(warmup_steps=8, decay_fraction=0.5)
    assert factors(schedule, 4) == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 0]
    assert factors(schedule, 6)[3:] == pytest.approx([4 / 8, 5 / 8, 1 / 3, 0])


def test_a_run_may_be_warm_up_alone() -> None:
    assert factors(CosineAnnealing(warmup_steps=4), 4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(WarmupStableDecay(warmup_steps=2, decay_fraction=0.5), 4)[:4] == [0.5, 1, 1, 0.5]


schedules = st.one_of(
    st.builds(CosineAnnealing, warmup_steps=st.integers(0, 9), min_lr=st.floats(0, LR)),
    st.builds(
        WarmupStableDecay,
        warmup_steps=st.integers(0, 9),
        decay_fraction=st.floats(0, 0.5).filter(lambda fraction: fraction == 0 or fraction > 0.01),
        min_lr=st.floats(0, LR),
    ),
)


@given(schedules, st.integers(18, 60))
def test_a_rate_rises_to_the_peak_and_then_falls_to_the_floor(schedule: Any, max_steps: int) -> None:
    found = factors(schedule, max_steps)
    warm, cold = found[: schedule.warmup_steps], found[schedule.warmup_steps :]
    assert all(0 < a < b for a, b in pairwise(warm)) and all(a >= b for a, b in pairwise(cold))
    assert max(found) == 1
    assert all(factor >= schedule.min_lr / LR - 1e-12 for factor in cold)
    assert schedule(max_steps + 5, max_steps, LR) == pytest.approx(found[-1])


@pytest.mark.parametrize("schedule", [CosineAnnealing, WarmupStableDecay])
@pytest.mark.parametrize("name", ["warmup_steps", "min_lr"])
def test_negative_values_are_refused(schedule: type, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=-1: must be a .* number of 0 or more"):
        schedule(**{name: -1})


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"^decay_fraction={fraction}: must be from 0 to 1"):
        WarmupStableDecay(decay_fraction=fraction)


def test_all_impossible_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        AdamW(lr=0.0, eps=-1.0, weight_decay=-0.1, betas=(0.9, 1.0))
    assert [problem.split("=")[0] for problem in error.value.problems] == ["weight_decay", "lr", "eps", "betas"]
    with pytest.raises(ConfigError, match=r"lr_scheduler\.min_lr=0\.2: is above lr=0\.1"):
        AdamW(lr=0.1, lr_scheduler=CosineAnnealing(min_lr=0.2))
    with pytest.raises(ConfigError, match=r"^lr_scheduler='function': lacks warmup_steps, min_lr; .*:Schedule says"):
        AdamW(lr_scheduler=lambda step, max_steps, lr: 1.0)  # type: ignore[arg-type]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_only_matrices_decay() -> None:
    model = Model()
    built = AdamW(lr=LR, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6).build(model.named_parameters(), 10)
    decay = {id(p): group["weight_decay"] for group in built["optimizer"].param_groups for p in group["params"]}
    found = {name: decay.get(id(p)) for name, p in model.named_parameters()}
    assert found == {
        "embedding.weight": 0.3,
        "linear.weight": 0.3,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "frozen.weight": None,
        "frozen.bias": None,
    }
    for group in built["optimizer"].param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-6, True)


def test_the_rate_follows_the_schedule_step_by_step() -> None:
    schedule = WarmupStableDecay(warmup_steps=3, decay_fraction=0.4, min_lr=0.1)
    built = AdamW(lr=LR, lr_scheduler=schedule).build(Model().named_parameters(), 8)
    assert built["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(8):
        rates.append(built["optimizer"].param_groups[1]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([LR * factor for factor in factors(schedule, 8)[:8]])


def test_a_step_is_adamw_s() -> None:
    """The first step moves every weight by the rate, against its gradient's sign, after the decay."""
    model = Model()
    before = model.linear.weight.detach().clone()
    built = AdamW(lr=0.01, weight_decay=0.5).build(model.named_parameters(), 10)
    (model.linear.weight * torch.tensor([[3.0], [-2.0], [1.0], [-4.0]])).sum().backward()
    built["optimizer"].step()
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    torch.testing.assert_close(model.linear.weight.detach(), before * (1 - 0.01 * 0.5) - 0.01 * signs)
