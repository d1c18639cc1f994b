"""Ai2's OLMo 2 (OLMo et al. 2025)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

OLMO2_1B = fdl.Config(
    TransformerConfig,
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    vocab_size=100_352,
    layernorm_epsilon=1e-6,
    norm_placement="post",
    qk_layernorm="projection",
    rotary_base=500_000.0,
)

OLMO2_7B = fdl.copy_with(OLMO2_1B, num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)

OLMO2_13B = fdl.copy_with(OLMO2_1B, num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)

OLMO2_32B = fdl.copy_with(
    OLMO2_1B, num_layers=64, hidden_size=5120, ffn_hidden_size=27648, num_attention_heads=40, num_query_groups=8
)


@model_recipe
def olmo2_1b() -> Recipe:
    """OLMo 2 1B, pretraining on 8 GPUs."""
    return pretrain(OLMO2_1B, seq_length=4096, lr=4e-4, micro_batch_size=8)


@model_recipe
def olmo2_7b() -> Recipe:
    """OLMo 2 7B, pretraining on 8 GPUs."""
    return pretrain(OLMO2_7B, seq_length=4096, micro_batch_size=4, activation_checkpointing="selective")


@model_recipe
def olmo2_13b() -> Recipe:
    """OLMo 2 13B, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(OLMO2_13B, seq_length=4096, num_nodes=2, micro_batch_size=16, activation_checkpointing="full")


@model_recipe
def olmo2_32b() -> Recipe:
    """OLMo 2 32B, pretraining on 4 nodes of 8 GPUs."""
    return pretrain(OLMO2_32B, seq_length=4096, num_nodes=4, micro_batch_size=8, activation_checkpointing="full")
