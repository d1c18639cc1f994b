"""Mistral and Mixtral."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import LAYER, LLAMA_MODULES, SETTINGS, SILU, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, LLAMA_SIZES, Fields
from fiddlehead.checkpoints.huggingface.families.experts import read_balance, write_balance
from fiddlehead.checkpoints.huggingface.families.windows import read_window, write_window
from fiddlehead.models.config import TransformerConfig

_MISTRAL_SIZES: Fields = LLAMA_SIZES | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}


def _read_mixtral(settings: Fields) -> Fields:
    return read_window(settings) | read_balance(settings)


def _write_mixtral(config: TransformerConfig) -> Fields:
    return write_window(config) | write_balance(config)


MISTRAL = Family(
    model_type="mistral",
    precedence=1,
    architecture="MistralForCausalLM",
    required=SILU,
    read=read_window,
    write=write_window,
    defaults=COMMON | _MISTRAL_SIZES | {"head_dim": None, "sliding_window": 4096},
    nullable=("sliding_window",),
)
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    modules={
        **LLAMA_MODULES,
        "layers.*.mlp.router": LAYER + "block_sparse_moe.gate",
        "layers.*.mlp.experts.linear_fc1": (
            LAYER + "block_sparse_moe.experts.#.w1",
            LAYER + "block_sparse_moe.experts.#.w3",
        ),
        "layers.*.mlp.experts.linear_fc2": LAYER + "block_sparse_moe.experts.#.w2",
    },
    aliases={"num_experts": "num_local_experts"},
    settings={
        **SETTINGS,
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
    },
    required=SILU | {"router_jitter_noise": (0.0, 0)},
    read=_read_mixtral,
    write=_write_mixtral,
    defaults=COMMON
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
)
