"""Random tokens, for timing a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fiddlehead.data.batches import Batch
from fiddlehead.data.contents import Contents, Known
from fiddlehead.data.steps import StepDataModule
from fiddlehead.data.tokenizers import ByteTokenizer
from fiddlehead.errors import Problem
from fiddlehead.numbers import is_whole
from fiddlehead.recipe.resumable import Resumable


class RandomTokens(StepDataModule):
    """Batches of random tokens, of the shapes that `PreTrainingDataModule` makes; there is nothing to read first.

    Args:
        vocab_size: tokens are from 0 to one below it.
    """

    separate_documents = False

    def __init__(
        self,
        vocab_size: int,
        seq_length: int = 2048,
        micro_batch_size: Resumable[int] = 4,
        global_batch_size: int = 8,
        num_workers: Resumable[int] = 0,
        seed: int = 1234,
    ) -> None:
        sound = is_whole(vocab_size) and vocab_size >= 1
        problems = [] if sound else [Problem("vocab_size", vocab_size, "must be a whole number of 1 or more")]
        super().__init__(seq_length, micro_batch_size, global_batch_size, 0, num_workers, seed, problems)
        self.vocab_size = vocab_size

    def missing_rows(self, vocab_size: int) -> list[str]:
        """As in the base: every id below `self.vocab_size` occurs."""
        if self.vocab_size <= vocab_size:
            return []
        return [f"the data has {self.vocab_size} tokens, and the model has vocab_size={vocab_size}"]

    def known(self) -> Known:
        """As in the base."""
        return Known((Contents("random tokens"),), vocab_size=self.vocab_size, endless=True)

    def setup(self, stage: str | None = None) -> None:
        """Makes the samples."""
        if self.trainer is not None:
            self.trainer.limit_val_batches = 0
        self._train = _Random(self.vocab_size, self.seq_length)
        self._tokenizer = ByteTokenizer()  # nobody reads the tokens, but a run has a tokenizer


class _Random:
    """Samples; sample i is drawn with the seed i."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.vocab_size, self.seq_length = vocab_size, seq_length

    def __len__(self) -> int:
        return 2**31

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        samples = [
            torch.randint(self.vocab_size, (self.seq_length + 1,), generator=torch.Generator().manual_seed(index))
            for index in indices
        ]
        windows = torch.stack(samples)
        return {
            "input_ids": windows[:, :-1].contiguous(),
            "labels": windows[:, 1:].contiguous(),
            "index": torch.tensor(indices),
        }
