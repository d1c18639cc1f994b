"""Rows of examples: packed rows have whole examples, and are to the model what each example is alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.data.documents import NO_LABEL
from fiddlehead.data.examples import Example
from fiddlehead.data.rows import Rows, pack
from fiddlehead.models import Transformer, TransformerConfig


@given(st.lists(st.integers(1, 20), max_size=40))
def test_packing_keeps_every_example_whole_and_no_row_too_long(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    used = [sum(lengths[number] for number in row) for row in rows]
    assert all(length <= 20 for length in used)
    assert sum(length <= 10 for length in used) <= 1  # or two rows would be one


@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
def test_packed_is_the_same_as_each_alone(position: Any) -> None:
    generator = np.random.default_rng(0)
    examples = []
    for length in generator.integers(4, 24, 12):
        ids = generator.integers(0, 50, length)
        examples.append((Example(ids.astype(np.int64), np.arange(length) >= length // 2),))
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=50, seq_length=32,
        position_embedding_type=position, init_method_std=0.3,
    )  # fmt: skip
    model = Transformer(config)

    def loss_and_gradients(packed: bool) -> list[torch.Tensor]:
        rows = Rows(examples, 32, 0, packed=packed)
        batch = rows.__getitems__(range(len(rows)))
        logits = model(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"]).flatten(0, 1)
        loss = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum", ignore_index=NO_LABEL)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    packed, alone = loss_and_gradients(True), loss_and_gradients(False)
    for one, other in zip(packed, alone, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    total = torch.zeros(())
    for ((text,),) in zip(examples, strict=True):  # and as the model has it without any packing
        logits = model(torch.from_numpy(text.ids[None, :-1]))[0]
        labels = torch.from_numpy(np.where(text.learned[1:], text.ids[1:], NO_LABEL))
        total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL).detach()
    assert torch.allclose(total, packed[0], rtol=1e-5)
