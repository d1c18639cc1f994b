"""Document packing: documents that share a row but do not attend to each other."""

from __future__ import annotations

import torch
from torch import Tensor

NO_LABEL = -100
"""The label that no loss counts; PyTorch's own choice."""


def separate(labels: Tensor, ends: Tensor) -> dict[str, Tensor | int]:
    """The additional fields of a batch of windows whose documents are kept apart.

    A document also ends at the end of its window. The label of its last token is the first token of another document,
    which nothing in this one tells; so it is taken out of the loss.

    Args:
        labels: (B, T) int64.
        ends: whether a document ends with a token, (B, T) bool; it is changed.

    Returns:
        `labels`: those given, with `NO_LABEL` where a document ends.
        `cu_seqlens`: where each document begins among the B x T tokens, and the end of the last, int32. As many empty
            documents follow as make their number a power of two: another shape may mean to compile anew.
        `max_seqlen`: the longest document's length, rounded up to a power of two or to T for the same reason.
    """
    masked = labels.masked_fill(ends, NO_LABEL)
    ends[:, -1] = True
    return {"labels": masked, **borders(ends.flatten().nonzero().flatten() + 1, labels.shape[1])}


def borders(after: Tensor, seq_length: int) -> dict[str, Tensor | int]:
    """`cu_seqlens` and `max_seqlen` of documents of which each ends before the token `after` in the batch.

    Args:
        after: (documents,), ascending; the last is the number of all tokens.
        seq_length: which no document exceeds.
    """
    longest = int(after.diff(prepend=after.new_zeros(1)).max())
    cu_seqlens = torch.full((power_of_two(len(after)) + 1,), int(after[-1]), dtype=torch.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(after) + 1] = after
    return {"cu_seqlens": cu_seqlens, "max_seqlen": min(power_of_two(longest), seq_length)}


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`, 1 or more."""
    return 1 << (n - 1).bit_length()
