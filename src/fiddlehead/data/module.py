"""The Lightning data module for pretraining: windows of a token dataset, in an order that no run has to remember."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from fiddlehead.data.batches import Batches, FromGlobalStep, Windows
from fiddlehead.data.corpus import StandardLibrary, tokenize_corpus
from fiddlehead.data.sampler import GlobalBatchSampler, micro_batches
from fiddlehead.data.token_file import FORMAT_VERSION, SPLITS, TokenDatasetInfo, TokenFile
from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from fiddlehead.errors import ConfigError

T = TypeVar("T")


class PreTrainingDataModule(pl.LightningDataModule):
    """Batches of `seq_length` tokens for next-token prediction.

    `paths` is a folder made by `tokenize`; its tokenizer comes with it, and another one is refused. None is the source
    code of Python's standard library, tokenized once with `tokenizer` (None: bytes) into `cache_dir`, by default
    `$FIDDLEHEAD_CACHE` or `~/.cache/fiddlehead`.

    A batch is `input_ids` and `labels`, (micro_batch_size, seq_length) int64, where a label is the token that follows,
    and `index`, (micro_batch_size,) int64, the number of the window. Windows cross the borders of documents. A training
    step takes `global_batch_size` windows; which ones is a pure function of `seed` and the step, so a run that
    continues needs no state of its data. Validation sees at most `val_samples` windows, always the same, spread evenly
    over the validation split, and as many on every rank; 0 is no validation.

    `separate_documents` keeps the documents of a window apart, in training and validation: a token sees its own
    document only, positions start anew with each, and what follows a document's end is not to be predicted, so that
    each is as if it were alone. (No token is then predicted from the end before it: a model that is to write without a
    prompt learns how documents begin only without this option.) It is what NeMo's `reset_attention_mask`,
    `reset_position_ids` and `eod_mask_loss` are together, without a mask in memory: a batch then also has `cu_seqlens`,
    int32, and `max_seqlen`, for attention on packed sequences, and -100 for labels that do not count.

    Raises one `ConfigError` for all sizes that make no sense.
    """

    def __init__(
        self,
        paths: str | Path | None = None,
        tokenizer: Tokenizer | BPETokenizer | None = None,
        seq_length: int = 2048,
        micro_batch_size: int = 4,
        global_batch_size: int = 8,
        val_samples: int = 256,
        separate_documents: bool = False,
        num_workers: int = 0,
        seed: int = 1234,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        positive = {
            "seq_length": seq_length,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": global_batch_size,
        }
        natural = {"val_samples": val_samples, "num_workers": num_workers, "seed": seed}
        problems = [f"{name}={value}; allowed: 1 or more" for name, value in positive.items() if value < 1]
        problems += [f"{name}={value}; allowed: 0 or more" for name, value in natural.items() if value < 0]
        if min(micro_batch_size, global_batch_size) >= 1 and global_batch_size % micro_batch_size:
            problems.append(
                f"global_batch_size={global_batch_size} is no multiple of micro_batch_size={micro_batch_size}; "
                f"allowed: {micro_batch_size}, {2 * micro_batch_size}, {3 * micro_batch_size}, ..."
            )
        if isinstance(tokenizer, BPETokenizer) and paths is not None:
            problems.append("tokenizer is untrained, but paths is a tokenized folder with its own; allowed: None")
        if problems:
            raise ConfigError(*problems)
        self.paths = None if paths is None else Path(paths).expanduser()
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.val_samples = val_samples
        self.separate_documents = separate_documents
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self._given_tokenizer = ByteTokenizer() if tokenizer is None and paths is None else tokenizer
        self._corpus = StandardLibrary()
        self._train: Windows | None = None
        self._val: Windows | None = None
        self._tokenizer: Tokenizer | None = None
        self.token_bytes: Tensor | None = None
        """UTF-8 bytes of each token after `setup`, (vocab_size,) int32; None where the tokenizer does not say."""

    # -- what the model and the task ask

    @property
    def vocab_size(self) -> int:
        """The number of different tokens; known before anything is built."""
        if self.paths is not None:
            return self.info().vocab_size
        assert self._given_tokenizer is not None
        return self._given_tokenizer.vocab_size

    def info(self) -> TokenDatasetInfo:
        """What the dataset says of itself; raises `ConfigError` that names `paths` if it is none."""
        try:
            return TokenDatasetInfo.read(self._directory())
        except ConfigError as error:
            raise ConfigError(*(f"paths={str(self.paths)!r}: {problem}" for problem in error.problems)) from error

    @property
    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer of the data; needs `setup`."""
        return _opened(self._tokenizer)

    def accumulate_grad_batches(self, world_size: int) -> int:
        """The micro-batches of one step on each of `world_size` data-parallel ranks.

        Raises `ConfigError`, with the allowed sizes, when the global batch does not divide.
        """
        return micro_batches(self.micro_batch_size, self.global_batch_size, world_size)

    def batch_indices(self, step: int) -> list[int]:
        """The windows that all ranks together train on in `step`, in order; needs `setup`."""
        return self._sampler(rank=0, world_size=1, max_steps=0).indices(step).tolist()

    # -- Lightning's hooks

    def prepare_data(self) -> None:
        """Tokenizes the default corpus unless the cache has it."""
        if self.paths is not None or (out := self._directory()).exists():
            return
        assert self._given_tokenizer is not None
        start = time.perf_counter()
        print(f"tokenizing {self._corpus.name}, once", flush=True)  # noqa: T201  Lightning calls this on one rank only
        tokenize_corpus(self._corpus, self._given_tokenizer, out)
        info = TokenDatasetInfo.read(out)
        print(  # noqa: T201
            f"tokenized {self._corpus.name}: {info.train.tokens + info.val.tokens:,} tokens of {info.vocab_size} kinds "
            f"in {time.perf_counter() - start:.1f} s, kept in {out}",
            flush=True,
        )

    def setup(self, stage: str | None = None) -> None:
        """Opens the token files; raises `ConfigError` if they are damaged, too short or another tokenizer's."""
        if not self.val_samples and self.trainer is not None:
            self.trainer.limit_val_batches = 0  # else Lightning warns that there are no batches
        if self._train is not None:
            return
        directory, given = self._directory(), self._given_tokenizer
        fingerprint = None if given is None or isinstance(given, BPETokenizer) else given.fingerprint
        vocab_size = None if given is None else given.vocab_size
        train, val = (
            Windows(
                TokenFile(directory, s, expect_fingerprint=fingerprint, expect_vocab_size=vocab_size),
                self.seq_length,
                separate_documents=self.separate_documents,
            )
            for s in SPLITS
        )
        needed = f"seq_length={self.seq_length} needs {self.seq_length + 1} tokens"
        problems = []
        if not len(train):
            problems.append(f"{needed}; the training split of {directory} has {len(train.tokens)}")
        if not len(val) and self.val_samples:
            hint = "val_samples=0 trains without validation"
            problems.append(f"{needed}; the validation split of {directory} has {len(val.tokens)} ({hint})")
        if problems:
            raise ConfigError(*problems)
        self._train, self._val = train, val
        if given is None or isinstance(given, BPETokenizer):
            self._tokenizer = train.tokens.info.open_tokenizer(directory)
        else:
            self._tokenizer = given
        lengths = self._tokenizer.token_bytes()
        self.token_bytes = None if lengths is None else torch.from_numpy(lengths)

    def train_dataloader(self) -> Batches:
        """The micro-batches of this rank, from the trainer's global step to its max_steps."""
        trainer = self._trainer()
        rank, world_size = _data_rank(trainer)
        if trainer.max_steps < 1:
            raise ConfigError(f"max_steps={trainer.max_steps}; allowed: 1 or more, for the data has no end of its own")
        accumulate = self.accumulate_grad_batches(world_size)
        if trainer.accumulate_grad_batches != accumulate:
            raise ConfigError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} of the trainer; allowed: {accumulate}, for "
                f"global_batch_size={self.global_batch_size}, micro_batch_size={self.micro_batch_size} and "
                f"{world_size} data-parallel ranks"
            )
        sampler = FromGlobalStep(self._sampler(rank, world_size, trainer.max_steps), lambda: trainer.global_step)
        return self._batches(self._train, sampler)

    def val_dataloader(self) -> Batches | list[Batches]:
        """The validation windows of this rank."""
        if not self.val_samples:
            return []
        rank, world_size = _data_rank(self._trainer())
        windows = len(_opened(self._val))
        # As many on every rank: a sharded model waits for the rank that runs one batch more.
        samples = min(self.val_samples, windows) // world_size * world_size
        if not samples:
            raise ConfigError(
                f"val_samples={self.val_samples}: {min(self.val_samples, windows)} windows are too few for "
                f"{world_size} data-parallel ranks; allowed: 0, or at least one for each"
            )
        mine = (np.arange(samples) * windows // samples)[rank::world_size].tolist()
        size = self.micro_batch_size
        return self._batches(self._val, [mine[i : i + size] for i in range(0, len(mine), size)])

    # -- inside

    def _directory(self) -> Path:
        if self.paths is not None:
            return self.paths
        assert self._given_tokenizer is not None
        key = f"{self._corpus.identity} {self._given_tokenizer.fingerprint} {FORMAT_VERSION}"
        cache = self.cache_dir or os.environ.get("FIDDLEHEAD_CACHE") or "~/.cache/fiddlehead"
        return Path(cache).expanduser() / f"{self._corpus.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def _sampler(self, rank: int, world_size: int, max_steps: int) -> GlobalBatchSampler:
        return GlobalBatchSampler(
            num_samples=len(_opened(self._train)),
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            max_steps=max_steps,
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the data loaders are for a trainer: give it this data module")
        return self.trainer

    def _batches(self, windows: Windows | None, batch_sampler: Any) -> Batches:
        on_gpu = self._trainer().strategy.root_device.type == "cuda"
        return Batches(_opened(windows), batch_sampler, num_workers=self.num_workers, pin_memory=on_gpu)


def _opened(value: T | None) -> T:
    if value is None:
        raise RuntimeError("the data is not open yet: call prepare_data() and setup() first")
    return value


def _data_rank(trainer: pl.Trainer) -> tuple[int, int]:
    """The data-parallel rank and the number of such ranks; ranks that share a tensor-parallel model share both."""
    ranks = trainer.distributed_sampler_kwargs
    return (0, 1) if ranks is None else (ranks["rank"], ranks["num_replicas"])
