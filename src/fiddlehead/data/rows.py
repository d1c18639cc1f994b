"""Examples laid out in rows of one length, alone or packed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fiddlehead.data.batches import Batch
from fiddlehead.data.documents import NO_LABEL, borders
from fiddlehead.data.examples import Example


class Rows:
    """Examples laid out in rows, and the batches of them."""

    def __init__(
        self, examples: Sequence[tuple[Example, ...]], seq_length: int, pad_id: int, *, packed: bool = True
    ) -> None:
        """Lays them out.

        Args:
            examples: each a text, or two answers to compare, which then share a row.
            pad_id: the token of what is left of a row.
        """
        self.seq_length, self.pad_id = seq_length, pad_id
        self.longest = seq_length if not examples or len(examples[0]) == 1 else seq_length // 2
        room = self.longest + 1  # the last token is only predicted
        self.cut = sum(any(len(text.ids) > room for text in each) for each in examples)
        short = [tuple(Example(t.ids[:room], t.learned[:room]) for t in each) for each in examples]
        # The first token is never predicted.
        self.examples = [each for each in short if all(text.learned[1:].any() for text in each)]
        self.dropped = len(short) - len(self.examples)
        lengths = [sum(len(text.ids) - 1 for text in each) for each in self.examples]
        self.rows = pack(lengths, seq_length) if packed else [[number] for number in range(len(lengths))]
        self.tokens = sum(lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        filled = self.tokens / max(1, len(self.rows) * self.seq_length)
        text = f"{len(self.examples):,} in {len(self.rows):,} rows, {filled:.0%} filled"
        if self.cut:
            text += f"; {self.cut:,} were cut at {self.longest} tokens"
        return text + (f"; {self.dropped:,} dropped, of which no answer was left" if self.dropped else "")

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once, which the data loader's collation then has only to pass on."""
        T = self.seq_length
        input_ids = np.full((len(indices), T), self.pad_id, dtype=np.int64)
        labels = np.full((len(indices), T), NO_LABEL, dtype=np.int64)
        padding = np.zeros((len(indices), T), dtype=bool)
        after: list[int] = []
        pairs: list[tuple[int, ...]] = []
        for row, index in enumerate(indices):
            at = 0
            for number in self.rows[index]:
                documents = []
                for text in self.examples[number]:
                    end = at + len(text.ids) - 1
                    input_ids[row, at:end] = text.ids[:-1]
                    labels[row, at:end] = np.where(text.learned[1:], text.ids[1:], NO_LABEL)
                    documents.append(len(after))
                    after.append(row * T + end)
                    at = end
                pairs.append(tuple(documents))
            padding[row, at:] = True
            if at < T:
                after.append((row + 1) * T)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "padding": torch.from_numpy(padding),
            "index": torch.tensor(indices),
            **borders(torch.tensor(after), T),
        }
        if len(pairs[0]) == 2:
            batch["pairs"] = torch.tensor(pairs)
        return batch


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which examples share a row: the longest first, each into the fullest row that has room for it (best fit)."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room left, and the row's number; ascending
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        found = bisect_left(left, (lengths[number], -1))
        if found < len(left):
            space, row = left.pop(found)
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        if space > lengths[number]:
            insort(left, (space - lengths[number], row))
    return [sorted(row) for row in rows]
