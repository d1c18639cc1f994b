"""Hugging Face's SmolLM 2 (Ben Allal et al. 2025)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

SMOLLM2_135M = fdl.Config(
    TransformerConfig,
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    vocab_size=49_152,
    rotary_base=100_000.0,
    share_embeddings_and_output_weights=True,
)

SMOLLM2_360M = fdl.copy_with(
    SMOLLM2_135M, num_layers=32, hidden_size=960, ffn_hidden_size=2560, num_attention_heads=15, num_query_groups=5
)

SMOLLM2_1P7B = fdl.copy_with(
    SMOLLM2_135M,
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=None,
    rotary_base=130_000.0,
)


@model_recipe
def smollm2_135m() -> Recipe:
    """SmolLM 2 with 135 M parameters, pretraining on 8 GPUs."""
    return pretrain(SMOLLM2_135M, seq_length=2048, lr=3e-3, micro_batch_size=32)


@model_recipe
def smollm2_360m() -> Recipe:
    """SmolLM 2 with 360 M parameters, pretraining on 8 GPUs."""
    return pretrain(SMOLLM2_360M, seq_length=2048, lr=3e-3, micro_batch_size=32)


@model_recipe
def smollm2_1p7b() -> Recipe:
    """SmolLM 2 with 1.7 B parameters, pretraining on 8 GPUs."""
    return pretrain(SMOLLM2_1P7B, seq_length=2048, lr=5e-4, micro_batch_size=8)
