"""Granite."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import NO_BIAS, SETTINGS, SILU, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, LLAMA_SIZES, Fields
from fiddlehead.checkpoints.huggingface.families.rotary import read_rope, write_rope
from fiddlehead.models.config import TransformerConfig


def _read_granite(settings: Fields) -> Fields:
    return read_rope(settings) | {"softmax_scale": settings["attention_multiplier"]}


def _write_granite(config: TransformerConfig) -> Fields:
    return write_rope(config) | {"attention_multiplier": config.softmax_scale or config.head_dim**-0.5}


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    settings={
        **{theirs: ours for theirs, ours in SETTINGS.items() if theirs != "head_dim"},
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_scaling": "logits_scaling",
    },
    required=SILU | NO_BIAS | {"mlp_bias": (False,)},
    read=_read_granite,
    write=_write_granite,
    defaults=COMMON
    | LLAMA_SIZES
    | {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
)
