from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.data.sampler import GlobalBatchSampler, micro_batches, permute
from fiddlehead.errors import ConfigError


def sampler(num_samples: int = 100, rank: int = 0, world_size: int = 1, **changes: Any) -> GlobalBatchSampler:
    sizes: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 8, "seed": 7, "max_steps": 40} | changes
    return GlobalBatchSampler(num_samples, rank=rank, world_size=world_size, **sizes)


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 2**20))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(images), np.arange(size))


@given(st.integers(1, 2**48), st.data())
def test_permute_stays_inside_and_apart_for_huge_sizes(size: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    images = permute(np.array(values), size, seed=3, epoch=0)
    assert images.min() >= 0 and images.max() < size
    assert len(set(images.tolist())) == len(values)


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("size", [5, 16, 97, 1000])
def test_every_image_is_about_equally_frequent(size: int) -> None:
    """Where each value goes, over many seeds: chi-square of its counts against the uniform distribution."""
    trials = 40 * size if size < 100 else 4000
    images = np.stack([permute(np.array([0, size // 2]), size, seed, 0) for seed in range(trials)])
    for column in images.T:
        counts = np.bincount(column, minlength=size)
        chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
        assert abs(chi_square - (size - 1)) < 6 * np.sqrt(2 * max(size - 1, 2))


def test_neighbours_are_scattered() -> None:
    images = permute(np.arange(10_000), 10_000, seed=1, epoch=0)
    steps = np.diff(images)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05
    assert len(np.unique(steps)) > 7000  # a random permutation has about 7,900 different steps; a rotation has two


@given(st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1), (2, 1), (1, 1)]), st.integers(0, 39))
def test_a_steps_samples_do_not_depend_on_the_ranks(layout: tuple[int, int], step: int) -> None:
    world_size, micro = layout
    ranks = [sampler(rank=r, world_size=world_size, micro_batch_size=micro) for r in range(world_size)]
    per_step = ranks[0].micro_batches
    seen = [index for s in ranks for batch in list(s)[step * per_step : (step + 1) * per_step] for index in batch]
    assert sorted(seen) == sorted(sampler().indices(step).tolist())


def test_one_rank_sees_the_positions_in_order() -> None:
    assert [i for batch in list(sampler())[:4] for i in batch] == sampler().indices(0).tolist()


@given(st.integers(0, 40))
def test_the_sampler_can_start_at_any_step(start: int) -> None:
    whole = list(sampler(rank=1, world_size=2))
    rest = sampler(rank=1, world_size=2, start_step=start)
    assert list(rest) == whole[2 * start :]
    assert len(rest) == len(whole) - 2 * start


def test_an_epoch_has_every_sample_once_and_the_next_has_another_order() -> None:
    seen = [i for batch in sampler() for i in batch]
    assert sorted(seen[:100]) == sorted(seen[100:200]) == list(range(100))
    assert seen[:100] != seen[100:200]


def test_a_batch_may_be_larger_than_the_data() -> None:
    counts = np.bincount(sampler(num_samples=3).indices(0), minlength=3)
    assert counts.sum() == 8 and counts.min() >= 2


def test_unshuffled_is_in_order() -> None:
    plain = GlobalBatchSampler(10, 2, 4, rank=0, world_size=1, seed=0, max_steps=3, shuffle=False)
    assert list(plain) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]


def test_the_order_of_samples_never_changes() -> None:
    """A change here changes the data of every run that continues."""
    assert sampler(num_samples=10**9).indices(3).tolist() == [
        681507326,
        6849356,
        190977364,
        825986580,
        341173704,
        651602062,
        456521,
        678555083,
    ]


def test_the_indices_of_a_step_take_little_time() -> None:
    big = sampler(num_samples=10**9, global_batch_size=1024)
    times = []
    for step in range(20):
        start = time.perf_counter()
        big.indices(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_sizes_that_do_not_divide() -> None:
    assert micro_batches(2, 16, 4) == 2
    with pytest.raises(
        ConfigError, match=r"global_batch_size=12: is not a multiple of micro_batch_size=4 x 2 .*1, 2, 3, 6"
    ):
        micro_batches(4, 12, 2)
    with pytest.raises(ConfigError, match="allowed: a global_batch_size of 5, 10"):
        micro_batches(1, 8, 5)
    with pytest.raises(ConfigError, match="num_samples=0"):
        sampler(num_samples=0)
    with pytest.raises(ConfigError, match="rank=2"):
        sampler(rank=2, world_size=2)
