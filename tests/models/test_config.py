"""TransformerConfig: the values that it refuses, and its counts of parameters and FLOPs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fiddlehead.errors import ConfigError
from fiddlehead.models import RopeScaling, Transformer, TransformerConfig

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 2}
LLAMA3_8B = TransformerConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
)


def small(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**(SMALL | changes))


def problems(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        small(**changes)
    return error.value.problems


@pytest.mark.parametrize(
    "name",
    [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "kv_channels",
        "vocab_size",
        "seq_length",
    ],
)
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4"])
def test_a_size_is_a_whole_number(name: str, value: Any) -> None:
    (problem,) = problems(**{name: value})
    assert problem.startswith(f"{name}={value!r}: must be a whole number of 1 or more")


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads"])
def test_a_size_that_has_no_default_is_not_none(name: str) -> None:
    (problem,) = problems(**{name: None})
    assert problem == f"{name}=None: must be a whole number of 1 or more"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("normalization", "RMSnorm", "did you mean 'RMSNorm'"),
        ("activation", "silu", "'swiglu'"),
        ("position_embedding_type", "alibi", "allowed: rope, learned_absolute, none"),
        ("position_embedding_type", None, "allowed: rope, learned_absolute, none"),
        ("attention_dropout", 1.0, "at least 0 and below 1"),
        ("hidden_dropout", -0.1, "at least 0 and below 1"),
        ("hidden_dropout", "0.1", "at least 0 and below 1"),
        ("layernorm_epsilon", 0.0, "above 0"),
        ("rotary_base", -1.0, "above 0"),
        ("rotary_base", None, "above 0"),
        ("init_method_std", float("nan"), "above 0"),
        ("attention_backend", "flash5", "unknown backend"),
        ("attn_logit_softcapping", 0.0, "above 0 or None"),
        ("window_size", 1024, "two whole numbers of -1 or more"),
        ("window_size", (1023,), "two whole numbers of -1 or more"),
        ("window_size", (-2, 0), "two whole numbers of -1 or more"),
        ("window_attn_skip_freq", 2, "there is no window"),
        ("num_query_groups", 4, "does not divide num_attention_heads=6; allowed: 1, 2, 3, 6, None"),
        ("num_query_groups", 12, "does not divide num_attention_heads=6"),
        ("hidden_size", 27, "not a multiple of num_attention_heads=6; the nearest: 24 or 30; or set kv_channels"),
        ("hidden_size", 5, "the nearest: 6;"),
        ("kv_channels", 7, "a head has 7 channels; rotary positions turn pairs of channels"),
        ("hidden_size", 18, "a head has 3 channels; rotary positions turn pairs of channels"),
    ],
)
def test_an_impossible_value_is_named(name: str, value: Any, said: str) -> None:
    (problem,) = problems(**{name: value})
    assert name in problem and repr(value).strip("'") in problem and said in problem


def test_all_problems_are_listed_at_once() -> None:
    found = problems(
        num_layers=0,
        hidden_size=25,
        num_query_groups=4,
        activation="relu",
        hidden_dropout=2,
        rotary_base=0,
        vocab_size=-1,
    )
    names = [problem.split("=")[0] for problem in found]
    assert sorted(names) == sorted(
        ["num_layers", "vocab_size", "activation", "hidden_dropout", "rotary_base", "num_query_groups", "hidden_size"]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 25, "kv_channels": 8},
        {"kv_channels": 5, "position_embedding_type": "none"},
        {"attention_backend": "reference"},
    ],
    ids=str,
)
def test_possible_values_are_accepted(changes: dict[str, Any]) -> None:
    small(**changes)


def test_sizes_that_are_left_out_are_derived() -> None:
    config = small(num_query_groups=None)
    assert (config.head_dim, config.groups, config.ffn_size) == (4, 6, 96)
    config = small(kv_channels=10, ffn_hidden_size=7)
    assert (config.head_dim, config.groups, config.ffn_size) == (10, 2, 7)


def test_llama_3_8b_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = Transformer(LLAMA3_8B)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


def test_matmul_parameters_by_hand() -> None:
    # A layer: q and output 4096 x 4096, k and v 4096 x 1024, gate, up and down 4096 x 14336. The head: 4096 x 128256.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert LLAMA3_8B.num_matmul_parameters() == 32 * layer + 4096 * 128256


variants = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_channels": 6, "num_query_groups": None},
        {"activation": "gelu", "add_bias_linear": True, "normalization": "LayerNorm"},
        {"share_embeddings_and_output_weights": True, "position_embedding_type": "learned_absolute", "seq_length": 9},
    ],
    ids=["llama", "wide-heads", "gelu", "tied"],
)


@variants
def test_matmul_parameters_are_the_model_s_matrices(changes: dict[str, Any]) -> None:
    config = small(vocab_size=31, **changes)
    with torch.device("meta"):
        model = Transformer(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name)
    head = 31 * 24 if config.share_embeddings_and_output_weights else 0
    assert config.num_matmul_parameters() == matrices + head


@variants
def test_train_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """Torch counts all of attention's products; of a causal mask half is needed."""
    B, T = 3, 9
    config = small(vocab_size=31, attention_backend="reference", **changes)
    model = Transformer(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.int64)).sum().backward()
    attention = config.train_flops_per_token(T) - config.train_flops_per_token(0)
    assert counter.get_total_flops() == B * T * (config.train_flops_per_token(0) + 2 * attention)
    assert counter.get_total_flops() == B * T * config.train_flops_per_token(T, causal=False)


def test_train_flops_by_hand() -> None:
    # 7,504,658,432 matmul parameters; 32 layers x 8192 keys x 4096 channels, scores and sums, half of them masked.
    assert LLAMA3_8B.train_flops_per_token(8192) == 6 * 7_504_658_432 + 6 * 32 * 8192 * 4096
    assert LLAMA3_8B.train_flops_per_token(8192, causal=False) == 6 * 7_504_658_432 + 12 * 32 * 8192 * 4096


@pytest.mark.parametrize(
    ("skip", "windowed"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (1, []),
        (2, [0, 2, 4]),
        (6, [0, 1, 2, 3, 4]),
        (7, [0, 1, 2, 3, 4, 5]),
        ((1, 0, 0, 1, 1, 0), [0, 3, 4]),
    ],
)
def test_every_nth_layer_sees_everything(skip: Any, windowed: list[int]) -> None:
    config = small(num_layers=6, window_size=(3, 0), window_attn_skip_freq=skip)
    assert [layer for layer in range(6) if config.window(layer) == (3, 0)] == windowed
    assert all(config.window(layer) == (-1, -1) for layer in range(6) if layer not in windowed)


@pytest.mark.parametrize(
    ("skip", "said"),
    [
        (0, "whole number of 1 or more"),
        (True, "whole number of 1 or more"),
        ((1, 0, 1), "has 3 numbers; num_layers=2 needs as many"),
        ((1, 2), "each must be 1, with the window, or 0, without"),
    ],
)
def test_impossible_windowed_layers_are_named(skip: Any, said: str) -> None:
    (problem,) = problems(window_size=(3, 0), window_attn_skip_freq=skip)
    assert problem.startswith("window_attn_skip_freq") and said in problem


def test_a_layer_asks_of_attention_what_it_is_configured_for() -> None:
    config = small(num_layers=5, window_size=(3, 0), window_attn_skip_freq=2, seq_length=64, attention_dropout=0.1)
    windowed, full = (config.attention_spec(layer, torch.bfloat16, packed=True) for layer in range(2))
    assert (windowed.window_size, full.window_size) == ((3, 0), (-1, -1))
    assert windowed.packed and windowed.training and (windowed.dtype, windowed.dropout) == (torch.bfloat16, 0.1)
    inference = config.attention_spec(0, torch.bfloat16, training=False)
    assert (inference.training, inference.dropout, inference.packed) == (False, 0.0, False)


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    for left, seen in ((7, (-1, -1)), (6, (6, 0))):
        config = small(window_size=(left, 0), seq_length=8)
        assert config.attention_spec(0, torch.float32).window_size == seen
    assert config.attention_spec(0, torch.float32, packed=True, longest=7).window_size == (-1, -1)
    assert small(window_size=(9999, 0)).attention_spec(0, torch.float32).window_size == (9999, 0)  # nothing is known


def test_train_flops_of_a_window_are_those_of_the_keys_it_leaves() -> None:
    T, left = 2000, 299
    keys = sum(min(t + 0.5, left + 1) for t in range(T)) / T  # half of a token's own key is masked, as without a window
    config = small(window_size=(left, 0))
    attention = config.train_flops_per_token(T) - config.train_flops_per_token(0)
    assert attention == pytest.approx(2 * 12 * keys * 6 * 4, rel=1e-3)
    assert small(window_size=(T, 0)).train_flops_per_token(T) == small().train_flops_per_token(T)


def test_a_configuration_comes_back_from_json() -> None:
    config = small(window_size=(3, 0), window_attn_skip_freq=(1, 0), rope_scaling=RopeScaling(scale_factor=32.0))
    assert TransformerConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert TransformerConfig.from_dict(asdict(small())) == small()
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        TransformerConfig.from_dict(SMALL | {"n_layers": 2})


def test_impossible_rope_scaling_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        RopeScaling(scale_factor=0, old_context_len="8k")  # type: ignore[arg-type]
    assert [problem.split("=")[0] for problem in error.value.problems] == ["scale_factor", "old_context_len"]
    with pytest.raises(ConfigError, match=r"low_freq_factor=4\.0: must be below high_freq_factor=4\.0"):
        RopeScaling(low_freq_factor=4.0)
