"""Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import LAYER, LLAMA_MODULES, SETTINGS, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, Fields
from fiddlehead.checkpoints.huggingface.families.rotary import KINDS_OF_LAYER, read_rope, rotary
from fiddlehead.checkpoints.huggingface.families.windows import (
    layer_types,
    read_layer_types,
    types_of_layers,
    write_window,
)
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig

_GEMMA_DEFAULTS: Fields = COMMON | {
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
_GEMMA = {
    "activation": "geglu",
    "layernorm_zero_centered_gamma": True,
    "norm_placement": "both",
}
_GEMMA_MODULES = {
    **LLAMA_MODULES,
    "layers.*.post_attention_layernorm": LAYER + "post_attention_layernorm",
    "layers.*.pre_mlp_layernorm": LAYER + "pre_feedforward_layernorm",
    "layers.*.post_mlp_layernorm": LAYER + "post_feedforward_layernorm",
}
_GEMMA_SETTINGS = {
    **SETTINGS,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_REQUIRED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}


def _read_gemma(settings: Fields, full_every: int) -> Fields:
    types = settings["layer_types"] or types_of_layers(settings, lambda layer: (layer + 1) % full_every != 0)
    if settings["query_pre_attn_scalar"] <= 0:
        raise ConfigError(Problem("query_pre_attn_scalar", settings["query_pre_attn_scalar"], "must be above 0"))
    return read_layer_types(settings, types) | {
        "softmax_scale": settings["query_pre_attn_scalar"] ** -0.5,
        "embedding_multiplier": settings["hidden_size"] ** 0.5,
    }


def _write_gemma(config: TransformerConfig) -> Fields:
    scale = config.softmax_scale or config.head_dim**-0.5
    if config.embedding_multiplier != config.hidden_size**0.5:
        raise ConfigError(Problem("embedding_multiplier", message="Gemma has the square root of hidden_size"))
    return write_window(config) | {
        "layer_types": layer_types(config),
        "query_pre_attn_scalar": round(scale**-2),
        "hidden_act": "gelu_pytorch_tanh",
    }


def _read_gemma2(settings: Fields) -> Fields:
    return read_rope(settings) | _read_gemma(settings, full_every=2)


def _read_gemma3(settings: Fields) -> Fields:
    parameters = settings["rope_parameters"] or {}
    if parameters and not any(kind in parameters for kind in KINDS_OF_LAYER):
        raise ConfigError(Problem("rope_parameters", message=f"must have {' and '.join(KINDS_OF_LAYER)} in Gemma 3"))
    scaling = settings["rope_scaling"] or {}
    if "type" in scaling and "rope_type" not in scaling:
        raise ConfigError(Problem("rope_scaling.type", scaling["type"], "is called rope_type in Gemma 3"))
    full, local = (parameters.get(kind) or {} for kind in KINDS_OF_LAYER)
    if not isinstance(full, dict) or not isinstance(local, dict):
        raise ConfigError(Problem("rope_parameters", message=f"{' and '.join(KINDS_OF_LAYER)} must be objects"))
    if settings["sliding_window_pattern"] < 1:
        raise ConfigError(Problem("sliding_window_pattern", settings["sliding_window_pattern"], "must be 1 or more"))
    fields = _read_gemma(settings, full_every=settings["sliding_window_pattern"])
    local = rotary(local, settings | {"rope_theta": settings["rope_local_base_freq"]})
    if local["rope_scaling"] is not None:
        raise ConfigError(Problem("rope_parameters.sliding_attention", message="must have rope_type='default'"))
    base = local["rotary_base"] if fields["window_size"] is not None else None
    return fields | rotary(full | scaling, settings) | {"rotary_base_local": base}


def _write_gemma3(config: TransformerConfig) -> Fields:
    fields = _write_gemma(config)
    local = config.rotary_base if config.rotary_base_local is None else config.rotary_base_local
    sliding = {"rope_type": "default", "rope_theta": local}
    return fields | {
        "rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": sliding},
        "rope_local_base_freq": local,
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    modules=_GEMMA_MODULES,
    fixed=_GEMMA,
    settings=_GEMMA_SETTINGS,
    required=_GEMMA_REQUIRED,
    read=_read_gemma2,
    write=_write_gemma,
    defaults=_GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    nullable=("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "attention_dropout"),
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    modules=_GEMMA_MODULES,
    fixed=_GEMMA | {"qk_layernorm": "head"},
    settings=_GEMMA_SETTINGS,
    required=_GEMMA_REQUIRED,
    read=_read_gemma3,
    write=_write_gemma3,
    defaults=_GEMMA_DEFAULTS
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    nullable=("sliding_window", "attention_dropout"),
)
