"""Sampling from a model, one token at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fiddlehead.attention import Packages, Target
from fiddlehead.errors import ConfigError
from fiddlehead.inference import generation
from fiddlehead.inference.generation import Sampling, sample, sample_batch
from fiddlehead.models import Transformer, TransformerConfig, compiled_step

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
        self.values, self.seen = torch.tensor(logits), []

    def hidden(self, input_ids: torch.Tensor, caches: Any = None, new_lengths: Any = None) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return torch.zeros(*input_ids.shape, 1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.values.expand(*x.shape[:-1], -1)


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
    assert unlimited.seen == [[0, 0], [1], [1]]


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


@pytest.mark.parametrize("tokens", [-1, 2.5, "3", True])
def test_a_number_of_tokens_that_cannot_be_is_refused(model: Transformer, tokens: Any) -> None:
    with pytest.raises(ConfigError, match=r"^max_new_tokens=.*must be a whole number of 0 or more"):
        list(sample(model, [1], tokens))
    with pytest.raises(ConfigError, match=r"^max_new_tokens="):
        sample_batch(model, [[1]], tokens, Sampling())


def test_no_graph_is_kept(model: Transformer) -> None:
    generator = sample(model, PROMPT, 2)
    next(generator)
    assert torch.is_grad_enabled(), "between two tokens the caller's setting holds"
    next(generator)


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_query_groups": 2},
    "window": {"num_query_groups": 1, "window_size": (2, 0), "window_attn_skip_freq": 2},
    "learned": {"position_embedding_type": "learned_absolute"},
    "sinks": {"attention_sinks": True, "num_query_groups": 2},
    "experts": {"num_moe_experts": 3},
}


def shaped(name: str, hidden_size: int = 16, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=hidden_size, num_attention_heads=4, vocab_size=23, seq_length=24, init_method_std=0.5,
        **SHAPES[name], **changes,
    )  # fmt: skip
    return Transformer(config).eval()


@torch.no_grad()
def uncached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, with the whole text passed through the model for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids], device=model.embedding.weight.device))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", SHAPES)
def test_the_cache_changes_no_token(name: str) -> None:
    model = shaped(name)
    assert list(sample(model, PROMPT, 20, temperature=0)) == uncached(model, PROMPT, 20)


@pytest.mark.parametrize("name", SHAPES)
def test_each_sequence_of_a_batch_is_computed_as_if_alone(name: str) -> None:
    model = shaped(name)
    prompts = [PROMPT, [7], [5, 6, 7, 8, 9, 10]]
    greedy = Sampling(temperature=0)
    assert sample_batch(model, prompts, 12, greedy) == [uncached(model, prompt, 12) for prompt in prompts]
    drawn = sample_batch(model, prompts[:1] * 2, 12, Sampling(seed=4, top_k=9))
    assert drawn[0] == list(sample(model, PROMPT, 12, seed=4, top_k=9)) != drawn[1]


def test_a_sequence_ends_at_a_stop_and_at_the_model_s_length() -> None:
    model = shaped("gqa")
    whole = uncached(model, PROMPT, 21)
    stopped = sample_batch(model, [PROMPT, PROMPT], 99, Sampling(temperature=0), stop_ids=[whole[6]])
    assert stopped[0] == whole[: whole.index(whole[6])]
    assert sample_batch(model, [PROMPT], 99, Sampling(temperature=0))[0] == whole
    with pytest.raises(ConfigError, match="prompts: have 24 tokens"):
        sample_batch(model, [[1] * 24], 1)


def test_top_p_leaves_the_likeliest_that_have_enough() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]  # probabilities 0.09, 0.24, 0.64, 0.03
    kept = frequencies(logits, top_p=0.7)
    assert (kept > 0).tolist() == [False, True, True, False]
    assert (frequencies(logits, count=200, top_p=0.6) > 0).tolist() == [False, False, True, False]
    with pytest.raises(ConfigError, match="top_p=0: must be above 0"):
        Sampling(top_p=0)


def test_greedy_text_is_that_of_transformers() -> None:
    from fiddlehead.checkpoints.huggingface.families import FAMILIES
    from fiddlehead.checkpoints.huggingface.tensor_map import tensor_map
    from tests.models.hf_families import random_model

    theirs = random_model("llama31")
    state, family = theirs.state_dict(), FAMILIES["llama"]
    config = family.config(theirs.config.to_dict())
    ours = Transformer(config).eval()
    ours.load_state_dict(
        {each.name: each.to_ours([state[name] for name, _ in each.theirs]) for each in tensor_map(family, config)}
    )
    prompts = torch.tensor([[3, 1, 4, 1], [2, 7, 1, 8]])
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    assert sample_batch(ours, prompts.tolist(), 40, Sampling(temperature=0)) == expected[:, 4:].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_a_compiled_step_is_one_graph_and_changes_no_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but inductor's kernels and the capture, which take a GPU: the compiler refuses what breaks the graph."""
    dtype = torch.bfloat16 if name == "experts" else torch.float32
    model, prompts = shaped(name).to(dtype), [PROMPT, [5, 6, 7, 8, 9, 10]]
    steps: list[int] = []

    class Traced(compiled_step.CompiledStep):
        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            steps.append(len(tokens))
            return super().__call__(tokens)

    monkeypatch.setattr(compiled_step, "refuse_compiled_step", lambda *arguments: None)
    monkeypatch.setattr(compiled_step, "_WARM_UP", 99)
    monkeypatch.setattr(generation, "CompiledStep", Traced)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert list(sample(model, PROMPT, 12, temperature=0, compile=True)) == uncached(model, PROMPT, 12)
    written = sample_batch(model, prompts, 12, Sampling(temperature=0), compile=True)
    assert written == [uncached(model, prompt, 12) for prompt in prompts]
    assert steps == [1] * 11 + [2] * 11


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["gqa", "learned"])
def test_on_a_gpu_the_tokens_are_those_without_a_cache(name: str, compile: bool) -> None:
    """Also compiled and captured: of fourteen steps the first three are compiled, and the others replayed."""
    # Of float32 and a cache, the only other backend is flex, which a compiled step refuses.
    model = shaped(name, hidden_size=64, attention_backend="reference" if compile else "auto").cuda()
    prompts = [PROMPT, [5, 6, 7, 8, 9, 10]]
    assert list(sample(model, PROMPT, 14, temperature=0, compile=compile)) == uncached(model, PROMPT, 14)
    written = sample_batch(model, prompts, 14, Sampling(temperature=0), compile=compile)
    assert written == [uncached(model, prompt, 14) for prompt in prompts]
    assert list(sample(model, PROMPT, 14, seed=3, compile=compile)) == list(sample(model, PROMPT, 14, seed=3))
    stop = written[0][5]  # by then the next step is under way
    stopped = sample_batch(model, prompts[:1], 14, Sampling(temperature=0), [stop], compile=compile)
    assert stopped == [written[0][: written[0].index(stop)]]


def test_without_a_gpu_no_step_is_captured(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="captured on a GPU, and the model is on cpu; leave compile out"):
        next(sample(model, PROMPT, 1, compile=True))
    with pytest.raises(ConfigError, match="experts' products are compiled in bfloat16 only"):
        next(sample(shaped("experts"), PROMPT, 1, compile=True))


def test_what_flex_would_decode_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = Target.gpu("h100", Packages(torch="2.11.0", cudnn="9.19.0"))
    monkeypatch.setattr(Target, "of", lambda device: h100)
    cuda, config = (
        torch.device("cuda"),
        TransformerConfig(num_layers=2, hidden_size=512, num_attention_heads=8, vocab_size=23, seq_length=64),
    )
    with pytest.raises(ConfigError, match=r"^compile=True: flex would decode float32, 8/8 heads of 64"):
        compiled_step.refuse_compiled_step(config, cuda, torch.float32)
    compiled_step.refuse_compiled_step(config, cuda, torch.bfloat16)
    compiled_step.refuse_compiled_step(replace(config, attention_backend="reference"), cuda, torch.float32)
