"""StarCoder 2."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import LLAMA_MODULES, MLP, SETTINGS, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, Fields
from fiddlehead.checkpoints.huggingface.families.windows import read_window, write_window
from fiddlehead.models.config import TransformerConfig


def _read_starcoder2(settings: Fields) -> Fields:
    return read_window(settings) | {"hidden_dropout": settings["residual_dropout"]}


def _write_starcoder2(config: TransformerConfig) -> Fields:
    dropout = config.hidden_dropout
    return write_window(config) | {"residual_dropout": dropout, "embedding_dropout": dropout}


STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    modules={
        **LLAMA_MODULES,
        "layers.*.mlp.linear_fc1": MLP + "c_fc",
        "layers.*.mlp.linear_fc2": MLP + "c_proj",
    },
    fixed={"normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True},
    settings={
        "norm_epsilon" if theirs == "rms_norm_eps" else theirs: ours
        for theirs, ours in SETTINGS.items()
        if theirs != "head_dim"
    },
    required={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
    read=_read_starcoder2,
    write=_write_starcoder2,
    defaults=COMMON
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
)
