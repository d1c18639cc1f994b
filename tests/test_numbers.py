"""Values that are not usable numbers are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from fiddlehead.data import BPETokenizer, FineTuningDataModule, PreTrainingDataModule
from fiddlehead.data.random_tokens import RandomTokens
from fiddlehead.errors import ConfigError
from fiddlehead.inference.generation import Sampling
from fiddlehead.models import LoRA, RopeScaling, TransformerConfig, YarnRopeScaling
from fiddlehead.numbers import clock, count, duration, few_digits, figure, plain, rate, scientific, short
from fiddlehead.training import (
    AdamW,
    Checkpoint,
    CosineAnnealing,
    LanguageModel,
    Muon,
    Parallel,
    PreferenceModel,
    WarmupStableDecay,
)

SHAPE: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4}
TAKERS: dict[Callable[..., Any], tuple[dict[str, Any], tuple[str, ...]]] = {
    CosineAnnealing: ({}, ("warmup_steps", "min_lr")),
    WarmupStableDecay: ({}, ("warmup_steps", "min_lr", "decay_fraction")),
    AdamW: ({}, ("lr", "eps", "weight_decay", "state_bits")),
    Muon: ({}, ("lr", "momentum", "adamw_lr", "weight_decay", "eps")),
    Checkpoint: ({}, ("every_n_steps", "keep_last")),
    Parallel: ({}, ("data_parallel", "tensor_parallel", "pipeline_stages_per_rank")),
    PreferenceModel: ({"init_from": "run"}, ("beta",)),
    LanguageModel: (
        {"config": TransformerConfig(**SHAPE), "compile": "layers"},
        ("activation_checkpointing", "tiled_mlp", "tiled_attention"),
    ),
    LoRA: ({}, ("rank", "alpha", "dropout")),
    Sampling: ({}, ("temperature", "top_k", "top_p", "seed")),
    RopeScaling: ({}, ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")),
    YarnRopeScaling: (
        {"scale_factor": 2.0, "old_context_len": 8},
        ("scale_factor", "old_context_len", "beta_fast", "beta_slow", "mscale"),
    ),
    TransformerConfig: (
        SHAPE,
        (
            *("num_layers", "hidden_size", "vocab_size", "seq_length", "moe_router_topk", "num_query_groups"),
            *("layernorm_epsilon", "rotary_base", "rotary_percent", "attn_logit_softcapping", "softmax_scale"),
            *("embedding_multiplier", "residual_multiplier", "logits_scaling", "init_method_std"),
            *("moe_aux_loss_coeff", "attention_dropout", "hidden_dropout"),
        ),
    ),
    PreTrainingDataModule: (
        {},
        ("seq_length", "micro_batch_size", "global_batch_size", "val_samples", "num_workers", "seed"),
    ),
    FineTuningDataModule: ({"paths": "a.jsonl"}, ("seq_length", "val_fraction", "val_samples")),
    RandomTokens: ({"vocab_size": 9}, ("vocab_size", "seq_length")),
    BPETokenizer: ({}, ("vocab_size",)),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1])
@pytest.mark.parametrize(("taker", "given"), TAKERS.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_value_that_is_not_a_number_is_named(
    taker: Callable[..., Any], given: tuple[dict[str, Any], tuple[str, ...]], value: float
) -> None:
    settings, names = given
    taker(**settings)
    for name in names:
        with pytest.raises(ConfigError) as error:
            taker(**(settings | {name: value}))
        assert any(problem.startswith(f"{name}=") for problem in error.value.problems), error.value


@pytest.mark.parametrize("betas", [(math.nan, 0.9), (0.9, math.inf), (0.9,), (0.9, 1.0)])
def test_both_betas_are_looked_at(betas: Any) -> None:
    with pytest.raises(ConfigError, match="betas="):
        AdamW(betas=betas)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (short(8_030_261_248), "8.03 B"),
        (short(4_900_000_000_000), "4.9 T"),
        (short(124_439_808), "124 M"),
        (short(999_960), "1 M"),
        (short(999_400), "999 k"),
        (short(999_999_999), "1 B"),
        (short(9_999_999_999_999_999), "10000 T"),
        (short(12_345), "12.3 k"),
        (short(9_999), "9,999"),
        (short(0), "0"),
        (plain(3e-05), "3e-5"),
        (plain(1e-10), "1e-10"),
        (plain(1e22), "1e22"),
        (plain(-2.5e-07), "-2.5e-7"),
        (plain(0.0003), "0.0003"),
        (plain(math.inf), "inf"),
        (plain(1_000_000), "1,000,000"),
        (figure(7680.0), "7,680"),
        (figure(3.0289612e-05), "3.02896e-5"),
        (figure(175.8731, 4), "175.9"),
        (figure(1396.8731), "1,396.87"),
        (figure(-123456.7), "-123,457"),
        (figure(math.nan), "nan"),
        (few_digits(150_415.4), "150,415"),
        (few_digits(45.36), "45.4"),
        (few_digits(0.5291), "0.529"),
        (rate(3e-4), "3e-4"),
        (rate(0.02), "0.02"),
        (rate(0), "0"),
        (rate(1e-8), "1e-8"),
        (rate(1), "1"),
        (scientific(4.2137e22), "4.21e22"),
        (scientific(3e-5), "3.00e-5"),
        (count(1, "device"), "1 device"),
        (count(0, "device"), "0 devices"),
        (count(1024, "batch", "batches"), "1,024 batches"),
        (duration(0.04), "0.0 s"),
        (duration(59.4), "59 s"),
        (duration(59.6), "1 min"),
        (duration(200), "3 min 20 s"),
        (duration(3599.9), "1 h"),
        (duration(18_420), "5 h 7 min"),
        (duration(86_399), "1 d"),
        (duration(86400 * 12.18), "12 d 4 h"),
        (duration(86400 * 4302.2), "4,302 d"),
        (clock(7), "0:07"),
        (clock(754), "12:34"),
        (clock(3599.6), "1:00:00"),
        (clock(10_921), "3:02:01"),
    ],
)
def test_a_number_is_written_as_people_write_it(written: str, expected: str) -> None:
    assert written == expected
