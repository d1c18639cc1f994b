"""Chooses the samples of a step: a pure function of the seed, the step and the rank."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from fiddlehead.errors import ConfigError, Problem

_ROUNDS = 8


class GlobalBatchSampler:
    """The sample indices of each micro-batch of one rank.

    The run counts its samples: number step * global_batch_size + micro * (micro_batch_size * world_size)
    + rank * micro_batch_size + i is the i-th sample of a micro-batch. Number p is the sample p % num_samples, permuted,
    of epoch p // num_samples. So the samples of a step do not depend on the number of ranks, nothing is stored, and a
    run continues at any step exactly.

    Iterating yields lists of `micro_batch_size` indices, `micro_batches` of them per step, for the steps from
    `start_step` up to `max_steps`. Raises `ConfigError` for sizes that do not divide.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        max_steps: int,
        start_step: int = 0,
        shuffle: bool = True,
    ) -> None:
        if num_samples < 1:
            raise ConfigError(Problem("num_samples", num_samples, "must be 1 or more"))
        if not 0 <= rank < world_size:
            raise ConfigError(Problem("rank", rank, f"is not one of world_size={world_size} ranks"))
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.micro_batches = micro_batches(micro_batch_size, global_batch_size, world_size)
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.max_steps = max_steps
        self.start_step = start_step
        self.shuffle = shuffle

    def __len__(self) -> int:
        """The micro-batches of one rank from `start_step` to the end."""
        return max(0, self.max_steps - self.start_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches(self.start_step)

    def batches(self, start_step: int) -> Iterator[list[int]]:
        """The micro-batches of this rank from `start_step` up to `max_steps`."""
        for step in range(start_step, self.max_steps):
            batches = self.indices(step).reshape(self.micro_batches, self.world_size, self.micro_batch_size)
            yield from batches[:, self.rank].tolist()

    def indices(self, step: int) -> np.ndarray:
        """The samples of `step` on all ranks, (global_batch_size,) int64, in the order of their positions."""
        first = step * self.global_batch_size
        epochs, offsets = np.divmod(np.arange(first, first + self.global_batch_size), self.num_samples)
        if not self.shuffle:
            return offsets
        for epoch in np.unique(epochs):
            here = epochs == epoch
            offsets[here] = permute(offsets[here], self.num_samples, self.seed, int(epoch))
        return offsets


def micro_batches(micro_batch_size: int, global_batch_size: int, world_size: int) -> int:
    """The micro-batches that each rank runs in one step: the global batch over micro_batch_size x world_size.

    Raises `ConfigError`, with the allowed sizes, if that is not a whole number.
    """
    per_rank, rest = divmod(global_batch_size, micro_batch_size * world_size)
    if rest or not per_rank:
        at_once = micro_batch_size * world_size
        sizes = [size for size in range(1, global_batch_size + 1) if global_batch_size % (size * world_size) == 0]
        allowed = [f"a micro_batch_size of {', '.join(map(str, sizes))}"] if sizes else []
        allowed.append(f"a global_batch_size of {at_once}, {2 * at_once}, ...")
        message = f"is not a multiple of micro_batch_size={micro_batch_size} x {world_size} data-parallel ranks"
        raise ConfigError(
            Problem("global_batch_size", global_batch_size, f"{message}; allowed: {', or '.join(allowed)}")
        )
    return per_rank


def permute(values: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `values` under a permutation of [0, size) that `seed` and `epoch` choose; int64, any shape.

    A Feistel network permutes the smallest power of two that holds `size`, and a value that falls outside is permuted
    again until it falls inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). The
    power of two is less than twice `size`, so fewer than two rounds of it are needed on average.
    """
    bits = max(1, (size - 1).bit_length())
    keys = _round_keys(seed, epoch)
    images = _feistel(values.astype(np.uint64).ravel(), bits, keys)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = _feistel(images[outside], bits, keys)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64).reshape(values.shape)


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64))


def _feistel(values: np.ndarray, bits: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    """A keyed permutation of [0, 2^bits). The halves have bits // 2 and the other bits, and trade places each round."""
    high, low = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right, key) >> np.uint64(64 - high) if high else np.uint64(0))
        high, low = low, high
    return (left << np.uint64(low)) | right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 well mixed bits of each value: one round of a multiply-xorshift hash."""
    mixed = (values + key) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed
