"""Which dataset of a blend each sample comes from: a pure function of the sample's number, the weights and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fiddlehead.data.sampler import GlobalBatchSampler, permute

_TURN = 1 << 30
_STEP = 663_608_941  # _TURN over the golden ratio, odd, so that every place of the turn is visited once


class Blend:
    """Assigns samples to datasets by their weights.

    Sample p is at the place (p x step + shift) on a circle, which the datasets share by their weights. The step is the
    golden section of the circle, so any stretch of n samples has very nearly n x weight samples of each dataset, and
    how many there were before can be computed without a table.

    Args:
        weights: above 0; only their proportions count.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        inner = np.round(np.cumsum(shares / shares.sum()) * _TURN)[:-1]
        self.borders = [0, *(int(border) for border in inner), _TURN]
        """Where the part of each dataset begins on the circle, and the circle's end."""
        self._shift = int(np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0]) % _TURN

    def choose(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The datasets of the samples `first` to `first + count - 1`, and the number of each within its dataset.

        Both are (count,) int64.
        """
        numbers = np.arange(first, first + count) % _TURN
        places = (numbers * _STEP + self._shift) % _TURN
        datasets = np.searchsorted(self.borders, places, side="right") - 1
        before = np.diff([self._before(first, border) for border in self.borders])
        within = np.empty(count, dtype=np.int64)
        for dataset in np.unique(datasets):
            here = datasets == dataset
            within[here] = before[dataset] + np.arange(here.sum())
        return datasets, within

    def _before(self, count: int, border: int) -> int:
        """How many of the first `count` samples are at places below `border`."""
        above = _floor_sum(count, _TURN, _STEP, self._shift + _TURN - border)
        return _floor_sum(count, _TURN, _STEP, self._shift) + count - above


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of (a i + b) // m for i from 0 to n - 1, in O(log m) steps, as Euclid's algorithm has."""
    total = 0
    while n:
        total += (a // m) * n * (n - 1) // 2 + (b // m) * n
        a, b = a % m, b % m
        last = a * n + b
        n, b = last // m, last % m
        m, a = a, m
    return total


class BlendedBatchSampler(GlobalBatchSampler):
    """The samples of a weighted blend; `sizes` are the numbers of samples of the datasets, which follow each other.

    Sample p of the run is the next one of the dataset that `Blend` chooses. Each dataset is walked epoch by epoch,
    permuted anew in each, so none of its samples comes again before all have come.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, **options: Any) -> None:
        super().__init__(sum(sizes), seed=seed, **options)
        self.sizes, self.blend = sizes, Blend(weights, seed)

    def indices(self, step: int) -> np.ndarray:
        """As in the base."""
        datasets, within = self.blend.choose(step * self.global_batch_size, self.global_batch_size)
        begins = np.cumsum([0, *self.sizes])
        for dataset in np.unique(datasets):
            chosen = np.flatnonzero(datasets == dataset)
            size = self.sizes[dataset]
            epochs, offsets = np.divmod(within[chosen], size)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                offsets[here] = permute(offsets[here], size, self.seed + int(dataset), int(epoch))
            within[chosen] = begins[dataset] + offsets
        return within


def spread(sizes: Sequence[int], weights: Sequence[float], samples: int) -> np.ndarray:
    """At most `samples` samples of datasets that follow each other, (n,) int64.

    Each dataset has its share by the weights, or all that it has, spread evenly over it.
    """
    shares = np.round(samples * np.cumsum([0.0, *weights]) / sum(weights)).astype(int)
    begins = np.cumsum([0, *sizes])
    parts = []
    for dataset, size in enumerate(sizes):
        count = min(size, int(shares[dataset + 1] - shares[dataset]))
        parts.append(begins[dataset] + np.arange(count) * size // max(1, count))
    return np.concatenate(parts).astype(np.int64)
