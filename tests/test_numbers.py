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
        ("activation_checkpointing",),
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
