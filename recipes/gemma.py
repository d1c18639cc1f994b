"""Google's Gemma 2 and the text models of Gemma 3 (Gemma Team 2024, 2025)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import LinearRopeScaling, TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

GEMMA2_2B = fdl.Config(
    TransformerConfig,
    num_layers=26,
    hidden_size=2304,
    ffn_hidden_size=9216,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=256,
    softmax_scale=256**-0.5,
    embedding_multiplier=2304**0.5,
    window_size=(4095, 0),
    window_attn_skip_freq=2,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    vocab_size=256_000,
    layernorm_epsilon=1e-6,
    activation="geglu",
    layernorm_zero_centered_gamma=True,
    norm_placement="both",
    share_embeddings_and_output_weights=True,
)

GEMMA2_9B = fdl.copy_with(
    GEMMA2_2B,
    num_layers=42,
    hidden_size=3584,
    ffn_hidden_size=14336,
    num_attention_heads=16,
    num_query_groups=8,
    embedding_multiplier=3584**0.5,
)

GEMMA2_27B = fdl.copy_with(
    GEMMA2_2B,
    num_layers=46,
    hidden_size=4608,
    ffn_hidden_size=36864,
    num_attention_heads=32,
    num_query_groups=16,
    kv_channels=128,
    softmax_scale=144**-0.5,
    embedding_multiplier=4608**0.5,
)

GEMMA3_1B = fdl.Config(
    TransformerConfig,
    num_layers=26,
    hidden_size=1152,
    ffn_hidden_size=6912,
    num_attention_heads=4,
    num_query_groups=1,
    kv_channels=256,
    qk_layernorm="head",
    softmax_scale=256**-0.5,
    embedding_multiplier=1152**0.5,
    window_size=(511, 0),
    window_attn_skip_freq=6,
    rotary_base=1e6,
    rotary_base_local=10_000.0,
    vocab_size=262_144,
    layernorm_epsilon=1e-6,
    activation="geglu",
    layernorm_zero_centered_gamma=True,
    norm_placement="both",
    share_embeddings_and_output_weights=True,
)

GEMMA3_4B = fdl.copy_with(
    GEMMA3_1B,
    num_layers=34,
    hidden_size=2560,
    ffn_hidden_size=10240,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=262_208,
    embedding_multiplier=2560**0.5,
    window_size=(1023, 0),
    rope_scaling=fdl.Config(LinearRopeScaling),
)

GEMMA3_12B = fdl.copy_with(
    GEMMA3_4B,
    num_layers=48,
    hidden_size=3840,
    ffn_hidden_size=15360,
    num_attention_heads=16,
    num_query_groups=8,
    embedding_multiplier=3840**0.5,
)

GEMMA3_27B = fdl.copy_with(
    GEMMA3_4B,
    num_layers=62,
    hidden_size=5376,
    ffn_hidden_size=21504,
    num_attention_heads=32,
    num_query_groups=16,
    kv_channels=128,
    softmax_scale=168**-0.5,
    embedding_multiplier=5376**0.5,
)


@model_recipe
def gemma2_2b() -> Recipe:
    """Gemma 2 2B, pretraining on 8 GPUs."""
    return pretrain(GEMMA2_2B, seq_length=8192, micro_batch_size=2)


@model_recipe
def gemma2_9b() -> Recipe:
    """Gemma 2 9B, pretraining on 8 GPUs."""
    return pretrain(GEMMA2_9B, seq_length=8192, activation_checkpointing="selective")


@model_recipe
def gemma2_27b() -> Recipe:
    """Gemma 2 27B, pretraining on 4 nodes of 8 GPUs."""
    return pretrain(GEMMA2_27B, seq_length=8192, num_nodes=4, micro_batch_size=4, activation_checkpointing="full")


@model_recipe
def gemma3_1b() -> Recipe:
    """Gemma 3 1B, pretraining on 8 GPUs."""
    return pretrain(GEMMA3_1B, seq_length=8192, micro_batch_size=4)


@model_recipe
def gemma3_4b() -> Recipe:
    """Gemma 3 4B text model, pretraining on 8 GPUs."""
    return pretrain(GEMMA3_4B, seq_length=8192, micro_batch_size=2)


@model_recipe
def gemma3_12b() -> Recipe:
    """Gemma 3 12B text model, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(GEMMA3_12B, seq_length=8192, num_nodes=2, micro_batch_size=8, activation_checkpointing="full")


@model_recipe
def gemma3_27b() -> Recipe:
    """Gemma 3 27B text model, pretraining on 4 nodes of 8 GPUs."""
    return pretrain(GEMMA3_27B, seq_length=8192, num_nodes=4, micro_batch_size=4, activation_checkpointing="full")
