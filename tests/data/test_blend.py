from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.data.blend import Blend, BlendedBatchSampler, spread

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def sampler(**changes: Any) -> BlendedBatchSampler:
    given: dict[str, Any] = {
        "sizes": [7, 40], "weights": [30, 70], "seed": 7, "micro_batch_size": 2, "global_batch_size": 8,
        "rank": 0, "world_size": 1, "max_steps": 50,
    }  # fmt: skip
    return BlendedBatchSampler(**(given | changes))


@given(WEIGHTS, st.integers(0, 2**30), st.integers(0, 300), st.integers(1, 200))
def test_the_samples_before_are_those_that_a_count_gives(
    weights: list[float], seed: int, first: int, count: int
) -> None:
    blend = Blend(weights, seed)
    whole, numbers = blend.choose(0, first + count)
    for dataset in range(len(weights)):
        assert numbers[whole == dataset].tolist() == list(range((whole == dataset).sum()))
    datasets, within = blend.choose(first, count)
    assert np.array_equal(datasets, whole[first:]) and np.array_equal(within, numbers[first:])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [[30, 70], [1, 1, 1], [0.5, 99.5], [3, 1, 4, 1, 5]])
def test_every_stretch_has_the_shares_of_the_weights(weights: list[float], seed: int) -> None:
    blend = Blend(weights, seed)
    for first in (0, 1000, 2**31 - 7, 2**40):
        for count in (10, 100, 5000):
            datasets, _ = blend.choose(first, count)
            shares = np.bincount(datasets, minlength=len(weights))
            assert np.abs(shares - count * np.array(weights) / sum(weights)).max() < 4


def test_no_sample_of_a_dataset_comes_again_before_all_have_come() -> None:
    seen = Counter(int(i) for step in range(50) for i in sampler().indices(step))
    first, second = [seen[i] for i in range(7)], [seen[i] for i in range(7, 47)]
    assert sum(first) == pytest.approx(120, abs=3) and max(first) - min(first) <= 1
    assert sum(second) == pytest.approx(280, abs=3) and max(second) - min(second) <= 1


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 4), (4, 2), (2, 1)])
def test_the_samples_of_a_step_do_not_depend_on_the_ranks(world_size: int, micro: int) -> None:
    ranks = [sampler(rank=r, world_size=world_size, micro_batch_size=micro) for r in range(world_size)]
    batches = [list(each.batches(3)) for each in ranks]
    everything = sorted(i for rank in batches for batch in rank for i in batch)
    assert everything == sorted(int(i) for step in range(3, 50) for i in sampler().indices(step))


def test_another_seed_is_another_order() -> None:
    assert sampler(seed=8).indices(0).tolist() != sampler().indices(0).tolist()


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3), st.integers(0, 100))
def test_validation_is_spread_by_the_weights_as_far_as_there_is_any(sizes: list[int], samples: int) -> None:
    chosen = spread(sizes, [1, 2, 1], samples)
    borders = np.cumsum([0, *sizes])
    found = [int(((chosen >= a) & (chosen < b)).sum()) for a, b in pairwise(borders)]
    assert len(set(chosen.tolist())) == len(chosen) == sum(found) <= samples
    for number, size, weight in zip(found, sizes, (1, 2, 1), strict=True):
        assert number == size or abs(number - samples * weight / 4) <= 1
