"""LongRoPE: each sequence uses the factors of its own length, with a cache, in a batch, and in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead.attention import KVCache
from fiddlehead.checkpoints.huggingface.families import FAMILIES
from fiddlehead.checkpoints.huggingface.tensor_map import tensor_map
from fiddlehead.errors import ConfigError
from fiddlehead.inference.generation import Sampling, sample, sample_batch
from fiddlehead.models import LongRopeScaling, Transformer
from tests.models.hf_families import random_model

ORIGINAL = 8
IDS = torch.randint(1, 61, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return random_model("phi3_long")


@pytest.fixture(scope="module")
def model(theirs: Any) -> Transformer:
    family, state = FAMILIES["phi3"], theirs.state_dict()
    config = family.config(theirs.config.to_dict())
    assert isinstance(config.rope_scaling, LongRopeScaling) and config.rope_scaling.old_context_len == ORIGINAL
    ours = Transformer(config).eval()
    ours.load_state_dict(
        {each.name: each.to_ours([state[name] for name, _ in each.theirs]) for each in tensor_map(family, config)}
    )
    return ours


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def alone(model: Transformer, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([text]))[0] for text in texts]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL])
def test_a_text_has_the_logits_of_transformers_at_every_length(length: int, theirs: Any, model: Transformer) -> None:
    ids = torch.tensor([IDS[:length]])
    assert near(model(ids), theirs(ids).logits)


@pytest.mark.parametrize("length", [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1])
def test_text_that_grows_beyond_the_original_length_is_that_of_transformers(
    length: int, theirs: Any, model: Transformer
) -> None:
    prompt = IDS[:length]
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
    )[0, length:].tolist()
    assert list(sample(model, prompt, 24, temperature=0)) == expected == uncached(model, prompt, 24)


@torch.no_grad()
def uncached(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_each_text_of_a_batch_is_written_as_alone() -> None:
    """Drawn weights of another seed: the texts that are written differ, and grow beyond the length one by one."""
    torch.manual_seed(3)
    scaling = LongRopeScaling(
        short_factor=(1.0, 1.2, 1.0, 2.0), long_factor=(2.0, 5.0, 9.0, 30.0), scale_factor=8.0, old_context_len=ORIGINAL
    )
    config = FAMILIES["phi3"].config(
        {"model_type": "phi3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
        | {"intermediate_size": 40, "max_position_embeddings": 64}
    )
    model = Transformer(replace(config, rope_scaling=scaling, init_method_std=0.5)).eval()
    prompts = [IDS[:2], IDS[2:8], IDS[8:15], IDS[:ORIGINAL], IDS[5 : 6 + ORIGINAL], IDS[:30]]
    written = sample_batch(model, prompts, 20, Sampling(temperature=0))
    assert written == [uncached(model, prompt, 20) for prompt in prompts]
    assert len({tuple(text) for text in written}) == len(prompts)


@torch.no_grad()
def test_a_short_text_beside_a_long_one_is_as_alone(model: Transformer) -> None:
    texts = [IDS[:5], IDS[3 : 3 + ORIGINAL], IDS[1 : 2 + ORIGINAL], IDS[:20]]
    padded = torch.tensor([[*text, *[0] * (20 - len(text))] for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    caches = [
        KVCache.allocate(4, 24, model.config.groups, model.config.head_dim, torch.float32, "cpu") for _ in range(3)
    ]
    for found in (model(padded, new_lengths=lengths), model(padded, new_lengths=lengths, caches=caches)):
        for row, text, expected in zip(found, texts, alone(model, texts), strict=True):
            assert near(row[: len(text)], expected)


def test_a_short_document_beside_a_long_one_is_trained_as_alone(model: Transformer) -> None:
    texts = [IDS[:5], IDS[3 : 3 + ORIGINAL], IDS[1 : 2 + ORIGINAL], IDS[:18]]
    row = torch.tensor([id for text in texts for id in text]).view(2, -1)
    ends = torch.tensor([0, *[len(text) for text in texts]]).cumsum(0)
    cu_seqlens = torch.cat([ends, ends[-1:]]).int()  # and an empty document
    found = model(row, cu_seqlens, 32).flatten(0, 1)
    expected = torch.cat([model(torch.tensor([text]))[0] for text in texts])
    assert near(found, expected)
    gradients = []
    for logits in (found, expected):
        model.zero_grad()
        F.cross_entropy(logits[:-1], row.flatten()[1:]).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(near(one, other) for one, other in zip(*gradients, strict=True))
    model.zero_grad()


@torch.no_grad()
def test_a_cache_of_short_factors_is_not_gone_on_with_in_silence(model: Transformer) -> None:
    def caches(batch: int) -> list[KVCache]:
        sizes = model.config.groups, model.config.head_dim
        return [KVCache.allocate(batch, 24, *sizes, torch.float32, "cpu") for _ in range(3)]

    kept = caches(1)
    model(torch.tensor([IDS[: ORIGINAL - 1]]), caches=kept)
    after = model(torch.tensor([IDS[ORIGINAL - 1 : ORIGINAL]]), caches=kept)
    assert near(after[0], alone(model, [IDS[:ORIGINAL]])[0][-1:])
    with pytest.raises(ConfigError, match="a sequence grows beyond old_context_len=8"):
        model(torch.tensor([IDS[ORIGINAL : ORIGINAL + 1]]), caches=kept)

    uneven = caches(2)
    model(torch.tensor([IDS[:12]] * 2), caches=uneven, new_lengths=torch.tensor([12, ORIGINAL]))
    new = torch.tensor([IDS[12:13], IDS[:1]])
    with pytest.raises(ConfigError, match="a sequence grows beyond"):
        model(new, caches=uneven)
    found = model(new, caches=uneven, new_lengths=torch.tensor([1, 0]))
    assert near(found[0], alone(model, [IDS[:13]])[0][-1:])
