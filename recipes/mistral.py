"""Mistral's dense models (Jiang et al. 2023) and its mixture of experts (Jiang et al. 2024)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

MISTRAL_7B = fdl.Config(
    TransformerConfig,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32_000,
    window_size=(4095, 0),
)

MISTRAL_NEMO_12B = fdl.copy_with(
    MISTRAL_7B, num_layers=40, hidden_size=5120, kv_channels=128, vocab_size=131_072, rotary_base=1e6, window_size=None
)

MIXTRAL_8X7B = fdl.copy_with(
    MISTRAL_7B,
    rotary_base=1e6,
    window_size=None,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_aux_loss_coeff=0.00125,  # transformers' router_aux_loss_coef of 0.02, x topk / layers
)


@model_recipe
def mistral_7b() -> Recipe:
    """Mistral 7B v0.1, with its window of 4,096 tokens, pretraining on 8 GPUs."""
    return pretrain(MISTRAL_7B, seq_length=8192, micro_batch_size=2, activation_checkpointing=0.9)


@model_recipe
def mistral_nemo_12b() -> Recipe:
    """Mistral Nemo 12B, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(MISTRAL_NEMO_12B, seq_length=8192, num_nodes=2, micro_batch_size=8, activation_checkpointing="full")


@model_recipe
def mixtral_8x7b() -> Recipe:
    """Mixtral 8x7B, 47 B parameters, 13 B for each token, pretraining on 8 nodes of 8 GPUs."""
    return pretrain(MIXTRAL_8X7B, seq_length=4096, num_nodes=8, micro_batch_size=8, activation_checkpointing=0.5)
