"""BigCode's StarCoder 2 (Lozhkov et al. 2024)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

STARCODER2_3B = fdl.Config(
    TransformerConfig,
    num_layers=30,
    hidden_size=3072,
    ffn_hidden_size=12288,
    num_attention_heads=24,
    num_query_groups=2,
    vocab_size=49_152,
    normalization="LayerNorm",
    activation="gelu",
    add_bias_linear=True,
    rotary_base=999_999.4420358813,
    window_size=(4095, 0),
    init_method_std=0.018042,
    share_embeddings_and_output_weights=True,
)

STARCODER2_7B = fdl.copy_with(
    STARCODER2_3B,
    num_layers=32,
    hidden_size=4608,
    ffn_hidden_size=18432,
    num_attention_heads=36,
    num_query_groups=4,
    rotary_base=1e6,
)

STARCODER2_15B = fdl.copy_with(
    STARCODER2_3B,
    num_layers=40,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=4,
    rotary_base=100_000.0,
    share_embeddings_and_output_weights=False,
)


@model_recipe
def starcoder2_3b() -> Recipe:
    """StarCoder 2 3B, pretraining on 8 GPUs."""
    return pretrain(STARCODER2_3B, seq_length=4096, micro_batch_size=4)


@model_recipe
def starcoder2_7b() -> Recipe:
    """StarCoder 2 7B, pretraining on 8 GPUs."""
    return pretrain(STARCODER2_7B, seq_length=4096, micro_batch_size=4, activation_checkpointing=0.9)


@model_recipe
def starcoder2_15b() -> Recipe:
    """StarCoder 2 15B, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(STARCODER2_15B, seq_length=4096, num_nodes=2, micro_batch_size=16, activation_checkpointing="full")
