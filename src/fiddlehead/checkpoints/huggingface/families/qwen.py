"""Qwen 2, Qwen 3 and its mixtures of experts."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import LLAMA_MODULES, MLP, NO_BIAS, SETTINGS, SILU, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, Fields
from fiddlehead.checkpoints.huggingface.families.experts import read_balance, write_balance
from fiddlehead.checkpoints.huggingface.families.rotary import read_rope, write_rope
from fiddlehead.checkpoints.huggingface.families.windows import (
    layer_types,
    read_layer_types,
    sliding_window,
    types_of_layers,
    window_size,
    write_window,
)
from fiddlehead.models.config import TransformerConfig

_QWEN: Fields = COMMON | {
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
_QWEN3 = {"qk_layernorm": "head"}


def _read_qwen(settings: Fields) -> Fields:
    types = settings["layer_types"]
    if not settings["use_sliding_window"]:
        settings = settings | {"sliding_window": None}
    elif types is None:
        first = settings["max_window_layers"]
        types = types_of_layers(settings, lambda layer: layer >= first)
    return read_rope(settings) | read_layer_types(settings, types)


def _write_qwen(config: TransformerConfig) -> Fields:
    window = sliding_window(config)
    first = next((layer for layer, kind in enumerate(layer_types(config)) if kind == "sliding_attention"), None)
    return write_rope(config) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.num_layers if first is None else first,
        "layer_types": layer_types(config),
    }


def _read_qwen3_moe(settings: Fields) -> Fields:
    window = window_size(settings) if settings["use_sliding_window"] else None
    return (
        read_rope(settings)
        | read_balance(settings)
        | {
            "window_size": window,  # of all layers
            "moe_router_pre_softmax": not settings["norm_topk_prob"],
        }
    )


def _write_qwen3_moe(config: TransformerConfig) -> Fields:
    return (
        write_window(config)
        | write_balance(config)
        | {
            "use_sliding_window": config.window_size is not None,
            "norm_topk_prob": not config.moe_router_pre_softmax,
        }
    )


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={"add_qkv_bias": True},
    required=SILU,
    read=_read_qwen,
    write=_write_qwen,
    defaults=_QWEN_DENSE | {"head_dim": None},
    nullable=("num_key_value_heads", "sliding_window"),
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed=_QWEN3,
    required=SILU | NO_BIAS,
    read=_read_qwen,
    write=_write_qwen,
    defaults=_QWEN_DENSE | {"head_dim": 128},
    nullable=("num_key_value_heads", "sliding_window"),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    modules={
        **LLAMA_MODULES,
        "layers.*.mlp.router": MLP + "gate",
        "layers.*.mlp.experts.linear_fc1": (MLP + "experts.#.gate_proj", MLP + "experts.#.up_proj"),
        "layers.*.mlp.experts.linear_fc2": MLP + "experts.#.down_proj",
    },
    fixed=_QWEN3,
    aliases={"num_experts": "num_local_experts"},
    settings={
        **SETTINGS,
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
    },
    required=SILU | NO_BIAS | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    defaults=_QWEN
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
    nullable=("sliding_window",),
)
