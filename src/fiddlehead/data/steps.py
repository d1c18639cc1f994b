"""The base of the data modules: the order is a function of the step, and validation is always the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from fiddlehead.data.batches import Batches, FromGlobalStep, Samples
from fiddlehead.data.checksums import Checksums
from fiddlehead.data.contents import Known
from fiddlehead.data.sampler import GlobalBatchSampler, micro_batches
from fiddlehead.data.tokenizers import Tokenizer
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.numbers import is_whole

T = TypeVar("T")


class StepDataModule(pl.LightningDataModule):
    """A data module whose training step takes `global_batch_size` samples; which ones is a function of seed and step.

    A rank computes `micro_batch_size` samples at a time. `num_workers` processes load them; with 0, the training
    process does. `seed` decides the order of the samples. Validation uses at most `val_samples`, always the same,
    spread evenly, and as many on every rank; 0 is none. A derived class opens the samples in `setup`.

    Raises one `ConfigError` for all impossible sizes.
    """

    separate_documents: bool
    """Whether batches have `cu_seqlens`, and labels or tokens that do not count."""
    allow_changed = False
    """Whether a run may go on with changed data."""

    def __init__(
        self,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        val_samples: int,
        num_workers: int,
        seed: int,
        problems: Sequence[str],
    ) -> None:
        super().__init__()
        positive = {
            "seq_length": seq_length,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": global_batch_size,
        }
        natural = {"val_samples": val_samples, "num_workers": num_workers, "seed": seed}
        wrong = [
            Problem(name, value, f"must be a whole number of {least} or more")
            for least, values in ((1, positive), (0, natural))
            for name, value in values.items()
            if not (is_whole(value) and value >= least)
        ]
        sizes = (micro_batch_size, global_batch_size)
        if all(is_whole(size) and size >= 1 for size in sizes) and global_batch_size % micro_batch_size:
            allowed = (*(times * micro_batch_size for times in (1, 2, 3)), "...")
            message = f"is not a multiple of micro_batch_size={micro_batch_size}"
            wrong.append(Problem("global_batch_size", global_batch_size, message, allowed))
        refuse([*wrong, *problems])
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.val_samples = val_samples
        self.num_workers = num_workers
        self.seed = seed
        self._train: Samples | None = None
        self._val: Samples | None = None
        self._tokenizer: Tokenizer | None = None
        self.model_vocab_size: int | None = None
        """The rows of the model's embedding; a task sets it, and the tokens of the data must have rows."""
        self.token_bytes: Tensor | None = None
        """UTF-8 bytes of each token after `setup`, (vocab_size,) int32; None if the tokenizer does not say."""

    def checksums(self) -> Checksums:
        """The checksums of the data's files; needs `prepare_data`. Data without files has none.

        A file is read once: the cache folder keeps its checksum, by the file's size, time and inode.

        Raises:
            ConfigError: a file has changed since it was written.
        """
        return {}

    @property
    def missing(self) -> str:
        """Why training cannot start without data, though the run can be planned; "" if it can."""
        return ""

    def known(self) -> Known:
        """What is known of the data before it is opened; `missing` says what is not at hand."""
        return Known()

    def too_short(self) -> list[Problem]:
        """Which splits have no sample of `seq_length` tokens, as far as known before they are opened."""
        return []

    def num_samples(self, split: Literal["train", "val"]) -> int | None:
        """The samples of an epoch of a split, as far as known before it is opened; None if it is not."""
        return None

    def missing_rows(self, vocab_size: int) -> list[str]:
        """Sentences about tokens that occur in the data, as far as known, and have no row in a model of `vocab_size`.

        A tokenizer may have more tokens than the model has rows, as long as the others do not occur.
        """
        raise NotImplementedError

    def refuse_missing_rows(self) -> None:
        """Raises `ConfigError` if a token of the data has no row in the model, once `model_vocab_size` is known."""
        if self.model_vocab_size is not None:
            refuse(Problem("", message=each) for each in self.missing_rows(self.model_vocab_size))

    @property
    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer of the data; needs `setup`."""
        return opened(self._tokenizer)

    def accumulate_grad_batches(self, world_size: int) -> int:
        """The micro-batches of one step on each of `world_size` data-parallel ranks.

        Raises `ConfigError`, with the allowed sizes, when the global batch does not divide.
        """
        return micro_batches(self.micro_batch_size, self.global_batch_size, world_size)

    def batch_indices(self, step: int) -> list[int]:
        """The windows that all ranks together train on in `step`, in order; needs `setup`."""
        return self._sampler(rank=0, world_size=1, max_steps=0).indices(step).tolist()

    # -- Lightning's hooks

    def train_dataloader(self) -> Batches:
        """The micro-batches of this rank, from the trainer's global step to its max_steps."""
        trainer = self._trainer()
        rank, world_size = _data_rank(trainer)
        if trainer.max_steps < 1:
            raise ConfigError(Problem("max_steps", trainer.max_steps, "must be 1 or more, because the data has no end"))
        accumulate = self.accumulate_grad_batches(world_size)
        if trainer.accumulate_grad_batches != accumulate:
            message = (
                f"of the trainer, with global_batch_size={self.global_batch_size}, "
                f"micro_batch_size={self.micro_batch_size} and {world_size} data-parallel ranks"
            )
            given = trainer.accumulate_grad_batches
            raise ConfigError(Problem("accumulate_grad_batches", given, message, (accumulate,)))
        sampler = FromGlobalStep(self._sampler(rank, world_size, trainer.max_steps), lambda: trainer.global_step)
        # If all tokens have a label, all batches have as many labels.
        return self._batches(self._train, sampler, counted_over=accumulate if self.separate_documents else None)

    def val_dataloader(self) -> Batches | list[Batches]:
        """The validation windows of this rank."""
        if not self.val_samples:
            return []
        rank, world_size = _data_rank(self._trainer())
        chosen = self._validation(world_size)
        if not len(chosen):
            count = min(self.val_samples, len(opened(self._val)))
            message = f"{count} windows are too few for {world_size} data-parallel ranks; give 0, or one for each rank"
            raise ConfigError(Problem("val_samples", self.val_samples, message))
        mine = chosen[rank::world_size].tolist()
        size = self.micro_batch_size
        return self._batches(self._val, [mine[i : i + size] for i in range(0, len(mine), size)])

    # -- inside

    def _sampler(self, rank: int, world_size: int, max_steps: int) -> GlobalBatchSampler:
        return GlobalBatchSampler(len(opened(self._train)), **self._sampling(rank, world_size, max_steps))

    def _sampling(self, rank: int, world_size: int, max_steps: int) -> dict[str, Any]:
        """The arguments that every sampler takes."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.global_batch_size,
            "rank": rank,
            "world_size": world_size,
            "seed": self.seed,
            "max_steps": max_steps,
        }

    def _validation(self, world_size: int) -> np.ndarray:
        """The samples to validate on, (n,) int64; n is a multiple of `world_size`, which may be 0.

        Every rank has as many, because ranks with a sharded model wait for each other.
        """
        windows = len(opened(self._val))
        samples = min(self.val_samples, windows) // world_size * world_size
        return np.arange(samples) * windows // max(1, samples)

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the data loaders are for a trainer: give it this data module")
        return self.trainer

    def _batches(self, windows: Samples | None, batch_sampler: Any, counted_over: int | None = None) -> Batches:
        on_gpu = self._trainer().strategy.root_device.type == "cuda"
        return Batches(
            opened(windows),
            batch_sampler,
            num_workers=self.num_workers,
            pin_memory=on_gpu,
            counted_over=counted_over,
        )


def opened(value: T | None) -> T:
    """The value, once `setup` has made it."""
    if value is None:
        raise RuntimeError("the data is not open yet: call prepare_data() and setup() first")
    return value


def _data_rank(trainer: pl.Trainer) -> tuple[int, int]:
    """The data-parallel rank and the number of such ranks; ranks that share a tensor-parallel model share both."""
    ranks = trainer.distributed_sampler_kwargs
    return (0, 1) if ranks is None else (ranks["rank"], ranks["num_replicas"])
