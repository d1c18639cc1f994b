"""Random tokens have the shapes of real batches, and are the same each time."""

from __future__ import annotations

import pytest
import torch

from fiddlehead.data.random_tokens import RandomTokens
from fiddlehead.errors import ConfigError


def test_a_sample_is_the_same_whenever_it_is_drawn():
    data = RandomTokens(vocab_size=50, seq_length=64, micro_batch_size=3, global_batch_size=6)
    data.setup()
    assert data._train is not None
    batch = data._train.__getitems__([5, 9, 5])
    inputs, labels = batch["input_ids"], batch["labels"]
    assert inputs.shape == labels.shape == (3, 64) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert torch.equal(inputs[0], inputs[2]) and not torch.equal(inputs[0], inputs[1])
    assert inputs.min() >= 0 and 45 < inputs.max() < 50
    assert data.batch_indices(1) == data.batch_indices(1) != data.batch_indices(0)


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size=0: must be a whole number of 1 or more"):
        RandomTokens(vocab_size=0)
