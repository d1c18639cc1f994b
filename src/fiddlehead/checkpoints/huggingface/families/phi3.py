"""Phi-3 and Phi-4."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import ATTENTION, LLAMA_MODULES, MLP, SETTINGS, SILU, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, Fields
from fiddlehead.checkpoints.huggingface.families.rotary import kind_of, rope_parameters, rotary
from fiddlehead.checkpoints.huggingface.families.windows import window_size, write_window
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.rope import LongRopeScaling


def _read_phi3(settings: Fields) -> Fields:
    parameters = rope_parameters(settings)
    kind = kind_of(parameters)
    if kind in ("su", "yarn"):  # early names of LongRoPE in this family
        parameters = parameters | {"rope_type": "longrope"}
    elif kind not in ("default", "longrope"):
        raise ConfigError(Problem("rope_type", kind, "must be 'default' or 'longrope' in Phi-3"))
    return rotary(parameters, settings, partial=True) | {"window_size": window_size(settings)}


def _write_phi3(config: TransformerConfig) -> Fields:
    fields = write_window(config) | {"partial_rotary_factor": config.rotary_percent}
    if isinstance(scaling := config.rope_scaling, LongRopeScaling):
        fields["original_max_position_embeddings"] = scaling.old_context_len
    return fields


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    modules={
        **LLAMA_MODULES,
        "layers.*.self_attention.linear_qkv": ATTENTION + "qkv_proj",
        "layers.*.mlp.linear_fc1": MLP + "gate_up_proj",
    },
    settings={theirs: ours for theirs, ours in SETTINGS.items() if theirs != "head_dim"},
    required=SILU | {"resid_pdrop": (0.0, 0), "embd_pdrop": (0.0, 0)},
    read=_read_phi3,
    write=_write_phi3,
    defaults=COMMON
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
)
