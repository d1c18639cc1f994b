"""The starts of documents, against a plain loop over the tokens."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fiddlehead.data.documents import NO_LABEL, separate

EOS = 2


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Windows of a few different tokens, so that documents are short, empty ones among them; inputs and labels."""
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(st.integers(0, 3), min_size=T + 1, max_size=T + 1), min_size=B, max_size=B))
    windows = torch.tensor(rows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


ALL_EOS = torch.full((2, 4), EOS), torch.full((2, 4), EOS)
NO_EOS = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)


@given(batches())
@example(ALL_EOS)
@example(NO_EOS)
def test_documents_are_those_of_a_plain_loop(batch: tuple[Tensor, Tensor]) -> None:
    input_ids, labels = batch
    B, T = input_ids.shape
    found = separate(labels, input_ids == EOS)

    lengths: list[int] = []
    expected_labels = []
    for row, following in zip(input_ids.tolist(), labels.tolist(), strict=True):
        length = 0
        for t, (token, label) in enumerate(zip(row, following, strict=True)):
            length += 1
            if token == EOS or t == T - 1:
                lengths.append(length)
                length = 0
            expected_labels.append(NO_LABEL if token == EOS else label)

    cu_seqlens, max_seqlen, marked = found["cu_seqlens"], found["max_seqlen"], found["labels"]
    assert isinstance(cu_seqlens, Tensor) and isinstance(marked, Tensor) and isinstance(max_seqlen, int)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff()[: len(lengths)].tolist() == lengths
    assert (cu_seqlens[len(lengths) :] == B * T).all()
    assert marked.flatten().tolist() == expected_labels
    # Shapes and numbers that a compiler sees are few: powers of two, or the window's length.
    places = len(cu_seqlens) - 1
    assert places & (places - 1) == 0 and len(lengths) <= places < 2 * len(lengths)
    assert max_seqlen == T or max_seqlen & (max_seqlen - 1) == 0
    assert max(lengths) <= max_seqlen <= min(T, 2 * max(lengths))


def test_the_batch_is_not_changed() -> None:
    input_ids, labels = torch.tensor([[0, EOS, 1, 1]]), torch.tensor([[EOS, 1, 1, EOS]])
    before = input_ids.clone(), labels.clone()
    assert separate(labels, input_ids == EOS)["cu_seqlens"].tolist() == [0, 2, 4]  # type: ignore[union-attr]
    assert torch.equal(input_ids, before[0]) and torch.equal(labels, before[1])
