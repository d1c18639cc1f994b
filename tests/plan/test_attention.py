"""The attention calls of a run's ranks, known before they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fiddlehead.attention import Package, Packages, Target
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.plan.attention import choose, compared, on_longest, rows
from fiddlehead.plan.attention_calls import Calls, calls_of
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from tests.training.conftest import Parts, plan_of

H100 = Target.gpu("h100", Packages("2.11.0", "9.19.0", flash3=Package("3.0.0"), flash4=Package("4.0.0b36")))
LLAMA = TransformerConfig(num_layers=4, hidden_size=4096, num_attention_heads=32, num_query_groups=8, vocab_size=9)


def calls(seq_length: int = 1024, config: TransformerConfig = LLAMA, **rest: Any) -> Calls:
    return Calls(config=config, dtype=torch.bfloat16, seq_length=seq_length, **rest)


@pytest.mark.parametrize(
    ("ranks", "heads", "backend"),
    [
        ({}, (32, 8), "cudnn"),
        ({"tensor": 8}, (4, 1), "flash4"),  # grouped no longer, but multi-query
        ({"tensor": 16}, (2, 1), "flash4"),
        ({"tensor": 4}, (8, 2), "cudnn"),
        ({"context": 8}, (4, 1), "flash4"),
        ({"tensor": 2, "context": 8}, (2, 1), "flash4"),
        ({"pipeline": 2, "stages": 2}, (32, 8), "cudnn"),
    ],
)
def test_the_kernel_is_that_of_the_heads_that_a_rank_has(
    ranks: dict[str, Any], heads: tuple[int, int], backend: str
) -> None:
    (served,) = choose(calls(**ranks), H100)
    spec = served.choice.spec
    assert (spec.num_attention_heads, spec.num_query_groups) == heads
    assert (spec.same_length, spec.length) == (True, 1024)  # context parallel ranks have all of a sequence
    assert (served.choice.backend, rows((served,))) == (backend, [f"{backend} on h100"])


def test_the_layers_of_each_rank_of_a_pipeline_are_recorded() -> None:
    config = replace(LLAMA, window_size=(99, 0), window_attn_skip_freq=2)
    windowed, full = choose(calls(config=config, pipeline=2, stages=4), H100)
    assert windowed.layers_by_pipeline_rank == ((0, 2), ()) and full.layers_by_pipeline_rank == ((), (1, 3))


def test_shorter_documents_and_validations_that_get_another_kernel_are_said() -> None:
    passes = (("training", True), ("validation", False))
    chosen = choose(calls(4096, replace(LLAMA, kv_channels=128), packed=True, passes=passes), H100)
    found = {(served.during, served.lengths[0]): served.choice.backend for served in chosen}
    assert [length for during, length in found if during == "training"] == [4096, 2048, 1024]
    assert found["training", 4096] == "flash3" and found["training", 2048] == "flash4"
    assert found["training", 1024] == "flash3" and "packed" in chosen[0].choice.reasons["cudnn"]
    assert {tuple(served.lengths) for served in chosen} == {(4096,), (2048,), tuple(1 << n for n in range(10, -1, -1))}
    said = rows(chosen)
    assert said[0] == "flash3 on h100"
    assert said[1] == "flash4 on h100 (longest document of 1,025 to 2,048 tokens)"
    whole = choose(calls(passes=passes), H100)
    assert rows(whole) == ["cudnn on h100", "flash3 on h100 (validation)"]


def test_documents_that_fit_in_a_window_are_attended_to_without_it() -> None:
    config = replace(LLAMA, window_size=(300, 0), window_attn_skip_freq=2)
    chosen = choose(calls(config=config, packed=True), H100)
    found = {(s.layers, s.lengths): s.choice.spec.window_size for s in chosen}
    short = tuple(1 << n for n in range(8, -1, -1))
    assert found == {
        ((0, 2), (1024, 512)): (300, 0),
        ((0, 2), short): (-1, -1),
        ((1, 3), (1024, 512, *short)): (-1, -1),
    }
    assert [s.layers for s in on_longest(chosen)] == [(0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("target_modules", "without"),
    [
        (["linear_qkv"], 0),
        (["linear_fc1"], 1),
        (["linear_proj", "linear_fc2"], 1),
        (["layers.1.*"], 1),
        (["layers.1.mlp.*"], 2),
    ],
)
def test_layers_before_every_adapter_ask_for_no_gradients(
    parts: Parts, target_modules: list[str], without: int
) -> None:
    made = parts()
    model = LanguageModel(made["model"].config, init_from="weights", lora=LoRA(rank=2, target_modules=target_modules))
    model.config = replace(model.config, vocab_size=9, seq_length=16, attention_dropout=0.1)
    steps = on_longest(
        choose(calls_of(model, model.config, made["data"], "32-true", None), Target.of(torch.device("cpu")))
    )
    assert {layer: s.choice.spec.training for s in steps for layer in s.layers} == {0: without < 1, 1: without < 2}
    assert {s.choice.spec.dropout for s in steps} == {0.1}  # also they drop
    # What autograd says: gradients flow through what is computed from something that is trained.
    transformer = model.on_meta()
    x = transformer.embedding(torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    for number, layer in enumerate(transformer.layers):
        qkv = layer.self_attention.linear_qkv(layer.input_layernorm(x))  # pyright: ignore
        assert qkv.requires_grad == (number >= without)
        x = layer(x, None, None)


def test_preferences_are_compared_without_gradients(parts: Parts) -> None:
    data = parts()["data"]
    config = replace(LLAMA, seq_length=16, attention_dropout=0.1)
    for lora, dropout in ((None, 0.0), (LoRA(rank=2), 0.1)):
        model = PreferenceModel(config, init_from="weights", lora=lora)
        found = {during: spec for during, spec, _, _ in calls_of(model, model.config, data, "bf16-mixed", None).specs()}
        assert found.keys() == {"training", "validation", "comparison"}
        assert (found["comparison"].training, found["comparison"].dropout) == (False, dropout)
        assert (found["validation"].training, found["validation"].dropout) == (False, 0.0)


def test_the_plan_is_made_for_a_rank(parts: Parts) -> None:
    made = parts(devices=4, strategy=Parallel(tensor_parallel=2, context_parallel=2), val_samples=0)
    found = plan_of(made)
    (served,) = found.attention
    assert (served.choice.spec.num_attention_heads, served.choice.spec.num_query_groups) == (1, 1)


def test_a_backend_that_serves_no_rank_is_refused_once() -> None:
    config = replace(LLAMA, attention_backend="flash2")
    with pytest.raises(ConfigError) as refused:
        choose(calls(8192, config, packed=True, tensor=8, passes=(("training", True), ("validation", False))), H100)
    assert len(refused.value.problems) == 1 and "4/1 heads" in refused.value.problems[0]


def test_a_step_that_gets_another_kernel_than_was_said_is_warned_of(parts: Parts) -> None:
    made = parts(max_steps=1, attention_backend="reference")
    plan = plan_of(made)
    transformer, tokens = Transformer(plan.config), torch.zeros(1, 16, dtype=torch.int64)
    with compared(plan.attention):
        transformer(tokens)
        with torch.no_grad():
            transformer(tokens[:, :5])  # a sample, which nothing was said of
        with pytest.warns(
            UserWarning, match="reference serves float32, 4/2 heads of 4.* which attention.json does not"
        ):
            transformer(tokens, torch.tensor([0, 16], dtype=torch.int32), 16)
    transformer(tokens[:, :2])  # outside nobody looks
