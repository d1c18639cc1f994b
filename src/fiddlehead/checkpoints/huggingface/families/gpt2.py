"""GPT-2."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import Family, no_fields
from fiddlehead.checkpoints.huggingface.families.defaults import Fields
from fiddlehead.errors import ConfigError
from fiddlehead.models.config import TransformerConfig


def _write_gpt2(config: TransformerConfig) -> Fields:
    if config.groups != config.num_attention_heads or config.head_dim * config.groups != config.hidden_size:
        raise ConfigError("GPT-2 has as many key/value heads as heads, of hidden_size / heads")
    return {"embd_pdrop": config.hidden_dropout}


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    modules={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
        "layers.*.input_layernorm": "transformer.h.*.ln_1",
        "layers.*.pre_mlp_layernorm": "transformer.h.*.ln_2",
        "layers.*.self_attention.linear_qkv": "transformer.h.*.attn.c_attn",
        "layers.*.self_attention.linear_proj": "transformer.h.*.attn.c_proj",
        "layers.*.mlp.linear_fc1": "transformer.h.*.mlp.c_fc",
        "layers.*.mlp.linear_fc2": "transformer.h.*.mlp.c_proj",
    },
    transposed=("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"),
    ignored=(".attn.bias", ".attn.masked_bias"),
    fixed={
        "normalization": "LayerNorm",
        "activation": "gelu",
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
    aliases={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    settings={
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_inner": "ffn_hidden_size",
        "n_head": "num_attention_heads",
        "n_positions": "seq_length",
        "vocab_size": "vocab_size",
        "layer_norm_epsilon": "layernorm_epsilon",
        "initializer_range": "init_method_std",
        "attn_pdrop": "attention_dropout",
        "resid_pdrop": "hidden_dropout",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
    },
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    read=no_fields,
    write=_write_gpt2,
    defaults={
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
)
