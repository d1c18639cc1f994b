"""Small models of every family, made by transformers, with shapes that reveal mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")

LAYERS = 3
# 12 heads in 3 groups, a head dim that is not hidden / heads, an odd vocabulary, an epsilon that is nobody's default.
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,  # has no gradient, so it must not be in a text
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
# Three channel pairs turn 10, 1.3 and 0.2 times in 64 positions: kept, in between, and slowed down.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 5.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
# 12 tokens are more than 8: a longer text takes the long factors, a shorter one the short ones.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "original_max_position_embeddings": 8,
    "short_factor": [1.0, 1.1],
    "long_factor": [1.5, 4.0],
}
WINDOW = 5
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
WIDE = {"head_dim": None, "hidden_size": 48}  # families whose head dim is always hidden / heads


def config(kind: str, **changes: Any) -> Any:
    """A configuration of class `kind`; a change to None leaves a setting to the class."""
    settings = {name: value for name, value in (SHAPE | changes).items() if value is not None}
    return getattr(transformers, kind)(**settings)


def gpt2() -> Any:
    sizes = {"n_positions": 64, "n_embd": 36, "n_layer": LAYERS, "n_head": 6, "n_inner": 50}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(
        vocab_size=61, layer_norm_epsilon=1e-3, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
        **sizes, **drop,
    )  # fmt: skip


def gemma(kind: str, **changes: Any) -> Any:
    return config(
        kind, hidden_act=None, sliding_window=WINDOW, layer_types=TYPES, query_pre_attn_scalar=7,
        tie_word_embeddings=True, **changes,
    )  # fmt: skip


def starcoder2() -> Any:
    return config(
        "Starcoder2Config", **WIDE, rms_norm_eps=None, norm_epsilon=1e-3, rope_parameters=DEFAULT,
        sliding_window=WINDOW, tie_word_embeddings=True,
    )  # fmt: skip


def granite() -> Any:
    multipliers = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3}
    return config("GraniteConfig", **WIDE, rope_parameters=DEFAULT, logits_scaling=2.5, **multipliers)


def qwen2(**changes: Any) -> Any:
    return config("Qwen2Config", head_dim=None, rope_parameters=DEFAULT, **changes)


def gpt_oss() -> Any:
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2}
    return config(
        "GptOssConfig", rope_parameters=YARN | {"truncate": False}, sliding_window=WINDOW, layer_types=TYPES, **experts
    )


def qwen3_moe(**changes: Any) -> Any:
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": []}
    return config("Qwen3MoeConfig", rope_parameters=DEFAULT, **experts, **changes)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: config("LlamaConfig", rope_parameters=DEFAULT),
    "llama_tied_biased": lambda: config(
        "LlamaConfig", rope_parameters=DEFAULT, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama31": lambda: config("LlamaConfig", rope_parameters=LLAMA3),
    "llama_yarn": lambda: config("LlamaConfig", rope_parameters=YARN),
    "llama_linear": lambda: config("LlamaConfig", rope_parameters=LINEAR),
    "llama_mha": lambda: config("LlamaConfig", rope_parameters=DEFAULT, num_key_value_heads=12, head_dim=4),
    "llama_mqa": lambda: config("LlamaConfig", rope_parameters=DEFAULT, num_key_value_heads=1),
    "mistral": lambda: config("MistralConfig", rope_parameters=DEFAULT, sliding_window=WINDOW),
    "mistral_nemo": lambda: config("MistralConfig", rope_parameters=DEFAULT | {"rope_theta": 1e6}),
    "qwen2": qwen2,
    "qwen2_windows": lambda: qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen2_yarn": lambda: config("Qwen2Config", head_dim=None, rope_parameters=YARN),
    "qwen3": lambda: config("Qwen3Config", rope_parameters=DEFAULT),
    "gemma2": lambda: gemma("Gemma2Config", rope_parameters=DEFAULT),
    "gemma3": lambda: gemma(
        "Gemma3TextConfig",
        rope_parameters={"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "phi3": lambda: config("Phi3Config", **WIDE, rope_parameters=DEFAULT, sliding_window=WINDOW),
    "phi3_long": lambda: config("Phi3Config", **WIDE, rope_parameters=LONGROPE, original_max_position_embeddings=8),
    "phi4_partial": lambda: config("Phi3Config", **WIDE, rope_parameters=DEFAULT | {"partial_rotary_factor": 0.5}),
    "starcoder2": starcoder2,
    "gpt2": gpt2,
    "olmo2": lambda: config("Olmo2Config", **WIDE, rope_parameters=DEFAULT),
    "granite": granite,
    "mixtral": lambda: config("MixtralConfig", rope_parameters=DEFAULT, num_local_experts=5),
    "qwen3_moe": lambda: qwen3_moe(norm_topk_prob=True),
    "qwen3_moe_unnormed": lambda: qwen3_moe(norm_topk_prob=False, use_sliding_window=True, sliding_window=WINDOW),
    "gpt_oss": gpt_oss,
}


def random_model(name: str) -> Any:
    """The model of that name, every parameter drawn: initial ones hide a swap, and leave the logits near zero."""
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = spread + (1 if parameter.dim() == 1 else 0)
    return model.eval()
