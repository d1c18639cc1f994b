"""Sampling from a model, a token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.generation import sample

PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=23, seq_length=8, init_method_std=0.5
    )
    return Transformer(config).eval()


class Fixed(torch.nn.Module):
    """A model with the same logits whatever it sees, which also remembers what it saw."""

    def __init__(self, logits: list[float], seq_length: int | None = None) -> None:
        super().__init__()
        self.config = TransformerConfig(
            num_layers=1, hidden_size=2, num_attention_heads=1, vocab_size=len(logits), seq_length=seq_length
        )
        self.embedding = torch.nn.Embedding(1, 1)
        self.logits, self.seen = torch.tensor(logits), []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return self.logits.expand(*input_ids.shape, -1)


def frequencies(logits: list[float], count: int = 4000, **options: Any) -> torch.Tensor:
    found = list(sample(Fixed(logits, seq_length=1), [0], count, **options))  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / count


def test_temperature_zero_takes_the_likeliest(model: Transformer) -> None:
    expected = list(PROMPT)
    for _ in range(12):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected[-8:]]))[0, -1].argmax()))
    assert list(sample(model, PROMPT, 12, temperature=0)) == expected[3:]
    assert list(sample(model, PROMPT, 12, top_k=1)) == expected[3:]


def test_a_seed_repeats_and_another_does_not(model: Transformer) -> None:
    torch.manual_seed(7)
    first = list(sample(model, PROMPT, 30, seed=5))
    torch.manual_seed(8)  # the global generator has no say
    assert list(sample(model, PROMPT, 30, seed=5)) == first
    assert list(sample(model, PROMPT, 30, seed=6)) != first


def test_the_model_sees_the_newest_tokens_up_to_its_length() -> None:
    fixed = Fixed([0.0, 9.0], seq_length=4)
    list(sample(fixed, [0, 0, 0, 0, 1], 3, temperature=0))  # type: ignore[arg-type]
    assert fixed.seen == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
    unlimited = Fixed([0.0, 9.0])
    list(sample(unlimited, [0, 0], 3, temperature=0))  # type: ignore[arg-type]
    assert unlimited.seen == [[0, 0], [0, 0, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = (torch.tensor(logits) / temperature).softmax(dim=0)
    torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, atol=0.03, rtol=0)


def test_top_k_leaves_the_likeliest_and_their_proportions() -> None:
    expected = torch.tensor([0.0, 1.0, 2.0, float("-inf")]).softmax(dim=0)
    expected = torch.where(torch.arange(4) == 0, 0.0, expected)
    torch.testing.assert_close(
        frequencies([0.0, 1.0, 2.0, -1.0], top_k=2), expected / expected.sum(), atol=0.03, rtol=0
    )
    every = frequencies([0.0, 0.0, 0.0], count=300, top_k=99)  # more than there are
    assert (every > 0).all()


@pytest.mark.parametrize("prompt", [[], [23], [-1, 2]])
def test_a_prompt_that_the_model_cannot_read_is_refused(model: Transformer, prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match="each below vocab_size=23"):
        next(sample(model, prompt, 1))


def test_no_graph_is_kept(model: Transformer) -> None:
    generator = sample(model, PROMPT, 2)
    next(generator)
    assert torch.is_grad_enabled(), "between two tokens the caller's setting holds"
    next(generator)
