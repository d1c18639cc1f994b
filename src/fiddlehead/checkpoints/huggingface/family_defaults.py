"""What a `config.json` says by leaving a field out: the defaults of transformers' configurations, by model type.

Tools write a field only if it differs from its default, and the defaults differ between families and from ours. The
tables are data. A test compares them with transformers, which is not needed to read them.
"""

from __future__ import annotations

from typing import Any

from fiddlehead.errors import ConfigError

Fields = dict[str, Any]

_COMMON: Fields = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_parameters": None,
    "rope_scaling": None,
}
_QWEN: Fields = _COMMON | {
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_QWEN_DENSE: Fields = _QWEN | {
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_window_layers": 28,
    "layer_types": None,
}
_LLAMA_SIZES: Fields = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL_SIZES: Fields = _LLAMA_SIZES | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
_GEMMA: Fields = _COMMON | {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}

DEFAULTS: dict[str, Fields] = {
    "llama": _COMMON | _LLAMA_SIZES | {"head_dim": None, "attention_bias": False, "mlp_bias": False},
    "mistral": _COMMON | _MISTRAL_SIZES | {"head_dim": None, "sliding_window": 4096},
    "qwen2": _QWEN_DENSE | {"head_dim": None},
    "qwen3": _QWEN_DENSE | {"head_dim": 128},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "phi3": _COMMON
    | {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "starcoder2": _COMMON
    | {
        "vocab_size": 49_152,
        "hidden_size": 3072,
        "intermediate_size": 12_288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "residual_dropout": 0.0,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    "olmo2": _COMMON | _LLAMA_SIZES | {"vocab_size": 50_304, "rms_norm_eps": 1e-5},
    "granite": _COMMON
    | _LLAMA_SIZES
    | {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "mixtral": _COMMON
    | _MISTRAL_SIZES
    | {
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    "qwen3_moe": _QWEN
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    "gpt_oss": _COMMON
    | {
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
    },
}

_NULL_IS_ABSENT = ("rope_parameters", "rope_scaling", "layer_types")
_NULLABLE: dict[str, tuple[str, ...]] = {
    "llama": ("attention_dropout",),
    "mistral": ("sliding_window",),
    "qwen2": ("num_key_value_heads", "sliding_window"),
    "qwen3": ("num_key_value_heads", "sliding_window"),
    "gemma2": ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "attention_dropout"),
    "gemma3_text": ("sliding_window", "attention_dropout"),
    "qwen3_moe": ("sliding_window",),
    "gpt_oss": ("sliding_window",),
}
"""Fields that have a default and may be null all the same, which says that there is no such thing."""


def completed(model_type: str, settings: Fields) -> Fields:
    """A `config.json` with the fields that it leaves out.

    Raises:
        ConfigError: a field is null that must not be, or not of the type of its default.
    """
    defaults = DEFAULTS[model_type]
    absent = [name for name in _NULL_IS_ABSENT if settings.get(name) is None]
    settings = {name: value for name, value in settings.items() if name not in absent}
    problems = []
    for name in sorted(defaults.keys() & settings.keys()):
        value, default = settings[name], defaults[name]
        if value is None:
            if default is not None and name not in _NULLABLE.get(model_type, ()):
                problems.append(f"{name}=null: must have a value; left out, it is {default!r}")
        elif problem := _problem(name, value, default):
            problems.append(f"{name}={value!r}: must be {problem}")
    if problems:
        raise ConfigError(*problems)
    return defaults | settings


def _problem(name: str, value: Any, default: Any) -> str | None:
    """What the value of a field must be and is not."""
    if name in ("rope_parameters", "rope_scaling"):
        return None if isinstance(value, dict) else "an object"
    if name == "layer_types":
        return None if isinstance(value, list) else "a list"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return "a whole number" if whole else "a number"
    return None
