"""Drafted tokens change nothing but the number of passes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fiddlehead.errors import ConfigError
from fiddlehead.inference.generation import Sampling, sample, sample_batch
from fiddlehead.inference.speculative import Draft, accept, residual
from fiddlehead.models import Transformer, TransformerConfig

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5]]


def transformer(seed: int = 0, layers: int = 2, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 23, "init_method_std": 0.5, "seq_length": 24}
    return Transformer(TransformerConfig(num_layers=layers, **(sizes | changes))).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return transformer()


@pytest.fixture(scope="module")
def near() -> Transformer:
    """A draft that is often right: the model with small changes."""
    changed = transformer()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return changed


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1, "layers": 1},
        {"seed": 1, "vocab_size": 32},
        {"seed": 1, "seq_length": 5},
        {"seed": 1, "seq_length": None},
        {},
    ],
    ids=["another", "padded", "shorter", "endless", "itself"],
)
@pytest.mark.parametrize("count", [1, 6, 13])
def test_the_likeliest_tokens_are_the_same(changes: dict[str, Any], count: int) -> None:
    model, draft = transformer(seq_length=12), Draft(transformer(**({"seq_length": 12} | changes)))
    for prompt in PROMPTS:  # with 13 tokens they become longer than the model can see
        plain = list(sample(model, prompt, count, temperature=0))
        assert list(sample(model, prompt, count, temperature=0, draft=draft)) == plain
    assert 1 <= draft.tokens_per_pass <= 5
    if not changes and count == 6:
        assert draft.tokens_per_pass == 3  # 5 and 1


@pytest.mark.parametrize("kind", [{"window_size": (3, 0)}, {"num_query_groups": 1, "attention_sinks": True}])
def test_so_it_is_with_other_attention_and_several_prompts(kind: dict[str, Any]) -> None:
    model, draft = transformer(**kind), Draft(transformer(1, **kind))
    greedy, ends = Sampling(temperature=0), [7, 11]
    found = sample_batch(model, PROMPTS, 12, greedy, ends, draft=draft)
    assert found == sample_batch(model, PROMPTS, 12, greedy, ends)


def test_a_good_draft_saves_passes_and_is_reported(model: Transformer, near: Transformer) -> None:
    draft = Draft(near)
    assert list(sample(model, [3], 20, temperature=0, draft=draft)) == list(sample(model, [3], 20, temperature=0))
    assert draft.passes < 12 and draft.tokens == 20


def test_the_same_seed_gives_the_same_tokens_whatever_the_other_prompts_are(
    model: Transformer, near: Transformer
) -> None:
    sampling = Sampling(seed=3, top_k=9, top_p=0.95)
    together = sample_batch(model, PROMPTS, 8, sampling, draft=Draft(near))
    for number, prompt in enumerate(PROMPTS):
        assert sample_batch(model, [prompt], 8, sampling, seeds=[3 + number], draft=Draft(near)) == [together[number]]


@pytest.mark.parametrize("seed", range(5))
def test_an_accepted_or_replaced_token_has_the_model_s_probability(seed: int) -> None:
    """Theorem 1 of the paper, for each token: drafted and kept, or anything drafted, not kept, and this one instead."""
    generator = torch.Generator().manual_seed(seed)
    wanted, guess = torch.randn(2, 6, generator=generator, dtype=torch.float64).softmax(-1) ** (1 + seed)
    wanted[seed] = 0 if seed % 2 else wanted[seed]
    wanted, guess = wanted / wanted.sum(), guess / guess.sum()
    kept = torch.minimum(torch.ones(()), wanted / guess)
    replaced = residual(wanted, guess)
    found = guess * kept + (guess * (1 - kept)).sum() * replaced / replaced.sum()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)


def test_equal_probabilities_leave_something_to_choose_from() -> None:
    same = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(same, same), same)


def test_drafted_texts_have_the_model_s_distribution() -> None:
    """Two tokens of three, where both models' probabilities depend on the token before."""
    generator = torch.Generator().manual_seed(0)
    wanted, guess = torch.randn(2, 4, 3, generator=generator).mul(1.5).softmax(-1)  # row 3: of the first token
    count, found = 4000, torch.zeros(3, 3)
    for _ in range(count):
        text: list[int] = []
        while len(text) < 2:
            drafted: list[int] = []
            for _ in range(2 - len(text)):
                before = [3, *text, *drafted][-1]
                drafted.append(int(torch.multinomial(guess[before], 1, generator=generator)))
            rows = [[3, *text, *drafted][len(text) + place] for place in range(len(drafted) + 1)]
            kept, token = accept(wanted[rows], [guess[row] for row in rows[:-1]], drafted, generator)
            text += [*drafted[:kept], token]
        found[text[0], text[1]] += 1
    expected = wanted[3][:, None] * wanted[:3]
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found / count - expected).abs() < 4 * error).all()


def test_each_token_is_chosen_from_the_probabilities_that_sampling_says() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
    for temperature, top_k, top_p in itertools.product((0, 0.7), (0, 2), (1.0, 0.6)):
        found = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, banned=(2,)).probabilities(logits)
        torch.testing.assert_close(found.sum(-1), torch.ones(2))
        assert (found[:, 2] == 0).all() and found[0].argmax() == 0


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"vocab_size": 20}, {}, "draft: has a vocabulary of 20, and the model one of 23"),
    ],
)
def test_a_draft_that_cannot_draft_is_refused(
    model: Transformer, changes: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        next(sample(model, [1], 4, draft=Draft(transformer(**changes)), **options))


def test_ids_that_are_not_tokens_need_no_row_in_the_draft(model: Transformer) -> None:
    banned = (20, 21, 22)
    plain = list(sample(model, [1], 9, temperature=0, banned=banned))
    draft = Draft(transformer(1, vocab_size=20))
    with pytest.raises(ConfigError, match="vocabulary of 20"):
        next(sample(model, [1], 9, draft=draft))
    assert list(sample(model, [1], 9, temperature=0, banned=banned, draft=draft)) == plain
