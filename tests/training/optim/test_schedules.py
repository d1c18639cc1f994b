"""A schedule says its course in one line, with the rates that it really has."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddlehead.training.optim import CosineAnnealing, Schedule, WarmupStableDecay, course


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (CosineAnnealing(warmup_steps=2000, min_lr=3e-5), "0 to 3e-4 in 2,000 steps, cosine to 3e-5 at 1,168,251"),
        (CosineAnnealing(), "3e-4, cosine to 0 at 1,168,251"),
        (CosineAnnealing(warmup_steps=10, min_lr=3e-4), "0 to 3e-4 in 10 steps, constant"),
        (
            CosineAnnealing(warmup_steps=2_336_502),
            "0 to 1.5e-4 in 1,168,251 steps; the warm-up to 3e-4 takes 2,336,502",
        ),
        (
            WarmupStableDecay(warmup_steps=100, decay_fraction=0.2),
            "0 to 3e-4 in 100 steps, constant until 934,601, linear to 0 at 1,168,251",
        ),
        (WarmupStableDecay(decay_fraction=1.0), "3e-4, linear to 0 at 1,168,251"),
        (WarmupStableDecay(decay_fraction=0.0), "3e-4, constant"),
        (
            WarmupStableDecay(warmup_steps=1_168_251, decay_fraction=0.0),
            "0 to 3e-4 in 1,168,251 steps",
        ),
    ],
)
def test_the_course_of_a_rate_is_one_line(schedule: Schedule, said: str) -> None:
    assert course(schedule, 1_168_251, 3e-4) == said


@given(
    st.builds(
        WarmupStableDecay,
        warmup_steps=st.integers(0, 300),
        decay_fraction=st.floats(0, 1),
        min_lr=st.sampled_from([0.0, 1e-5, 9e-4, 1e-3]),
    )
    | st.builds(CosineAnnealing, warmup_steps=st.integers(0, 300), min_lr=st.sampled_from([0.0, 1e-5, 1e-3])),
    st.integers(1, 200),
)
@settings(max_examples=100, deadline=None)
def test_the_rate_that_is_said_first_is_the_highest_and_is_reached_when_it_says(schedule: Any, steps: int) -> None:
    said = course(schedule, steps, 1e-3)
    rates = [1e-3 * schedule(step, steps, 1e-3) for step in range(steps)]
    rise = re.match(r"0 to (\S+) in ([\d,]+) steps", said)
    if rise:
        assert float(rise[1]) == pytest.approx(max(rates), rel=0.01)
        assert rates[int(rise[2].replace(",", "")) - 1] == pytest.approx(max(rates))
    else:
        assert schedule.warmup_steps <= 1 and said.startswith("1e-3, ")
        assert rates[0] == pytest.approx(max(rates))


def test_a_schedule_of_ones_own_is_said_by_its_rates() -> None:
    class Steps:
        warmup_steps, min_lr = 0, 0.0

        def __call__(self, step: int, max_steps: int, lr: float) -> float:
            return 1.0 if step < 600 else 0.1

    assert course(Steps(), 1000, 3e-4) == "Steps: 3e-4 at 1, 3e-5 at 1,000"
    assert course(Steps(), 1, 3e-4) == "Steps: 3e-4 at 1"
