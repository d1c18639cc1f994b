"""Llama, and SmolLM 2."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import SILU, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, LLAMA_SIZES, Fields
from fiddlehead.checkpoints.huggingface.families.rotary import read_rope, write_rope
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig


def _read_llama(settings: Fields) -> Fields:
    biases = [settings[name] for name in ("attention_bias", "mlp_bias")]
    if biases[0] != biases[1]:
        raise ConfigError(Problem("attention_bias", biases[0], f"must be the same as mlp_bias={biases[1]}"))
    return read_rope(settings) | {"add_bias_linear": biases[0]}


def _write_llama(config: TransformerConfig) -> Fields:
    bias = config.add_bias_linear
    return write_rope(config) | {"hidden_act": "silu", "attention_bias": bias, "mlp_bias": bias}


LLAMA = Family(
    model_type="llama",
    precedence=0,
    architecture="LlamaForCausalLM",
    ignored=("rotary_emb.inv_freq",),
    required=SILU,
    read=_read_llama,
    write=_write_llama,
    defaults=COMMON | LLAMA_SIZES | {"head_dim": None, "attention_bias": False, "mlp_bias": False},
    nullable=("attention_dropout",),
)
