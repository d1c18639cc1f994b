"""Turns windows of a token file into the batches that Lightning iterates over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from fiddlehead.data.documents import NO_LABEL, separate
from fiddlehead.data.sampler import GlobalBatchSampler
from fiddlehead.data.token_file import TokenFile
from fiddlehead.run import signals

Batch = dict[str, Any]
"""Tensors by name, and `max_seqlen`, a number."""


class Samples(Protocol):
    """The samples of batches."""

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch of them."""
        ...


class Windows(Dataset[Batch]):
    """Sample i is the seq_length + 1 tokens from i * seq_length on: the inputs, and the labels one token later."""

    def __init__(self, tokens: TokenFile, seq_length: int, *, separate_documents: bool = False) -> None:
        self.tokens = tokens
        self.seq_length = seq_length
        self.separate_documents = separate_documents

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once, which the data loader's collation then has only to pass on."""
        windows = torch.from_numpy(self.tokens.windows([i * self.seq_length for i in indices], self.seq_length + 1))
        batch: Batch = {
            "input_ids": windows[:, :-1].contiguous(),
            "labels": windows[:, 1:].contiguous(),
            "index": torch.tensor(indices),
        }
        if self.separate_documents:
            batch |= separate(batch["input_ids"], batch["labels"], self.tokens.info.eos_id)
        return batch


class Batches:
    """A data loader that Lightning takes as it is.

    Lightning rebuilds the samplers of what it knows as a `DataLoader`, and warns when it has no worker processes; these
    batches are slices of mapped memory and want none. The position is the trainer's step, so the state is empty; having
    one tells Lightning that a run may continue in the middle.

    Args:
        counted_over: how many batches are one step. Each of them then has `in_step`, the sum of `counts` over the step:
            what a mean over the step is divided by, known before its first batch is. None: batches have no such thing.
    """

    def __init__(
        self,
        samples: Samples,
        batch_sampler: Any,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        counted_over: int | None = None,
    ) -> None:
        self._counted_over = counted_over
        self._loader = DataLoader(
            cast(Any, samples),
            batch_sampler=batch_sampler,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=signals.heed_parent_only,  # a scheduler signals these processes too
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        if self._counted_over is None:
            yield from batches
            return
        while step := list(islice(batches, self._counted_over)):
            in_step = torch.stack([counts(batch) for batch in step]).sum(dim=0)
            yield from (batch | {"in_step": in_step} for batch in step)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class FromGlobalStep:
    """A batch sampler that starts where the trainer is when it is iterated.

    Its length counts from step 0 all the same: a trainer that continues adds the batches of the steps before to those
    it fetches, and compares the sum with the length.
    """

    def __init__(self, sampler: GlobalBatchSampler, global_step: Callable[[], int]) -> None:
        self._sampler = sampler
        self._global_step = global_step

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        return self._sampler.batches(self._global_step())


def counts(batch: Batch) -> torch.Tensor:
    """The numbers of a batch's labels, tokens without padding, and pairs of answers, (3,) int64."""
    labels, padding = batch["labels"], batch.get("padding")
    labelled = int((labels != NO_LABEL).sum())
    tokens = labels.numel() - (0 if padding is None else int(padding.sum()))
    return torch.tensor([labelled, tokens, len(batch.get("pairs", ()))])


def _as_it_is(batch: Any) -> Any:
    return batch
