"""Turns windows of token files into the batches that Lightning iterates over."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fiddlehead.data.documents import NO_LABEL, separate
from fiddlehead.data.sampler import GlobalBatchSampler
from fiddlehead.data.sources import Tokens
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
    """Windows of datasets that follow each other: of each those that it has, and a rest of tokens is left out.

    Sample i of a dataset is the seq_length + 1 tokens from i * seq_length on: the inputs, and the labels one token
    later.
    """

    def __init__(self, datasets: Sequence[Tokens], seq_length: int, *, separate_documents: bool = False) -> None:
        self.datasets = datasets
        self.seq_length = seq_length
        self.separate_documents = separate_documents
        self.sizes = [max(0, len(tokens) - 1) // seq_length for tokens in datasets]
        """The number of samples of each dataset."""
        self._begins = [0, *accumulate(self.sizes)]

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once, which the data loader's collation then has only to pass on."""
        T = self.seq_length
        windows = np.empty((len(indices), T + 1), dtype=np.int64)
        ends = np.empty((len(indices), T), dtype=bool) if self.separate_documents else None
        rows: dict[int, list[int]] = {}
        for row, index in enumerate(indices):
            rows.setdefault(bisect_right(self._begins, index) - 1, []).append(row)
        for number, here in rows.items():
            starts = [(indices[row] - self._begins[number]) * T for row in here]
            windows[here] = found = self.datasets[number].windows(starts, T + 1)
            if ends is not None:
                ends[here] = self.datasets[number].ends(starts, found[:, :-1])
        tokens = torch.from_numpy(windows)
        batch: Batch = {
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "index": torch.tensor(indices),
        }
        return batch if ends is None else batch | separate(batch["labels"], torch.from_numpy(ends))


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
