"""gpt-oss."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import ATTENTION, LLAMA_MODULES, MLP, SETTINGS, SILU, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, Fields
from fiddlehead.checkpoints.huggingface.families.experts import read_balance, write_balance
from fiddlehead.checkpoints.huggingface.families.rotary import read_rope
from fiddlehead.checkpoints.huggingface.families.windows import (
    layer_types,
    read_layer_types,
    types_of_layers,
    write_window,
)
from fiddlehead.models.config import TransformerConfig


def _read_gpt_oss(settings: Fields) -> Fields:
    types = settings["layer_types"] or types_of_layers(settings, lambda layer: layer % 2 == 0)
    return read_rope(settings) | read_layer_types(settings, types) | read_balance(settings)


def _write_gpt_oss(config: TransformerConfig) -> Fields:
    return write_window(config) | write_balance(config) | {"layer_types": layer_types(config)}


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    modules={
        **LLAMA_MODULES,
        "layers.*.self_attention.sinks": ATTENTION + "sinks",
        "layers.*.mlp.router": MLP + "router",
        "layers.*.mlp.experts.linear_fc1.weight": MLP + "experts.gate_up_proj",
        "layers.*.mlp.experts.linear_fc1.bias": MLP + "experts.gate_up_proj_bias",
        "layers.*.mlp.experts.linear_fc2.weight": MLP + "experts.down_proj",
        "layers.*.mlp.experts.linear_fc2.bias": MLP + "experts.down_proj_bias",
    },
    transposed=("experts.linear_fc1.weight", "experts.linear_fc2.weight"),
    interleaved=("experts.linear_fc1.weight", "experts.linear_fc1.bias"),
    fixed={"activation": "clamped_swiglu", "add_bias_linear": True, "attention_sinks": True},
    aliases={"num_experts": "num_local_experts"},
    settings={
        **SETTINGS,
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
    },
    required=SILU | {"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    read=_read_gpt_oss,
    write=_write_gpt_oss,
    defaults=COMMON
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
    nullable=("sliding_window",),
)
