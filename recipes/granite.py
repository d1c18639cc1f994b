"""IBM's Granite 3 (Granite Team 2024)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

GRANITE3_2B = fdl.Config(
    TransformerConfig,
    num_layers=40,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=49_155,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    softmax_scale=0.015625,
    logits_scaling=8.0,
    share_embeddings_and_output_weights=True,
)

GRANITE3_8B = fdl.copy_with(
    GRANITE3_2B, hidden_size=4096, ffn_hidden_size=12800, softmax_scale=0.0078125, logits_scaling=16.0
)


@model_recipe
def granite3_2b() -> Recipe:
    """Granite 3.0 2B, pretraining on 8 GPUs."""
    return pretrain(GRANITE3_2B, seq_length=4096, micro_batch_size=4)


@model_recipe
def granite3_8b() -> Recipe:
    """Granite 3.0 8B, pretraining on 8 GPUs."""
    return pretrain(GRANITE3_8B, seq_length=4096, micro_batch_size=2)
