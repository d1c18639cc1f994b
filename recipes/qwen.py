"""Alibaba's Qwen 2.5 and Qwen 3 (Yang et al. 2024, 2025)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

QWEN25_500M = fdl.Config(
    TransformerConfig,
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    vocab_size=151_936,
    rotary_base=1e6,
    layernorm_epsilon=1e-6,
    add_qkv_bias=True,
    share_embeddings_and_output_weights=True,
)

QWEN25_1P5B = fdl.copy_with(
    QWEN25_500M, num_layers=28, hidden_size=1536, ffn_hidden_size=8960, num_attention_heads=12, num_query_groups=2
)

QWEN25_3B = fdl.copy_with(
    QWEN25_500M, num_layers=36, hidden_size=2048, ffn_hidden_size=11008, num_attention_heads=16, num_query_groups=2
)

QWEN25_7B = fdl.copy_with(
    QWEN25_500M,
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    vocab_size=152_064,
    share_embeddings_and_output_weights=False,
)

QWEN25_14B = fdl.copy_with(
    QWEN25_7B,
    num_layers=48,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=8,
    layernorm_epsilon=1e-5,
)

QWEN25_32B = fdl.copy_with(QWEN25_14B, num_layers=64, ffn_hidden_size=27648)

QWEN25_72B = fdl.copy_with(
    QWEN25_14B, num_layers=80, hidden_size=8192, ffn_hidden_size=29568, num_attention_heads=64, num_query_groups=8
)

QWEN3_600M = fdl.Config(
    TransformerConfig,
    num_layers=28,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151_936,
    rotary_base=1e6,
    layernorm_epsilon=1e-6,
    qk_layernorm="head",
    share_embeddings_and_output_weights=True,
)

QWEN3_1P7B = fdl.copy_with(QWEN3_600M, hidden_size=2048, ffn_hidden_size=6144)

QWEN3_4B = fdl.copy_with(
    QWEN3_600M, num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, num_query_groups=8
)

QWEN3_8B = fdl.copy_with(
    QWEN3_600M,
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    share_embeddings_and_output_weights=False,
)

QWEN3_14B = fdl.copy_with(QWEN3_8B, num_layers=40, hidden_size=5120, ffn_hidden_size=17408, num_attention_heads=40)

QWEN3_32B = fdl.copy_with(QWEN3_8B, num_layers=64, hidden_size=5120, ffn_hidden_size=25600, num_attention_heads=64)

QWEN3_30B_A3B = fdl.copy_with(
    QWEN3_8B,
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_query_groups=4,
    num_moe_experts=128,
    moe_router_topk=8,
    moe_ffn_hidden_size=768,
    moe_aux_loss_coeff=0.000166666666667,  # transformers' router_aux_loss_coef of 0.001, x topk / layers
)


@model_recipe
def qwen25_500m() -> Recipe:
    """Qwen 2.5 0.5B, pretraining on 8 GPUs."""
    return pretrain(QWEN25_500M, seq_length=4096, micro_batch_size=16)


@model_recipe
def qwen25_1p5b() -> Recipe:
    """Qwen 2.5 1.5B, pretraining on 8 GPUs."""
    return pretrain(QWEN25_1P5B, seq_length=4096, micro_batch_size=4)


@model_recipe
def qwen25_3b() -> Recipe:
    """Qwen 2.5 3B, pretraining on 8 GPUs."""
    return pretrain(QWEN25_3B, seq_length=4096, micro_batch_size=4)


@model_recipe
def qwen25_7b() -> Recipe:
    """Qwen 2.5 7B, pretraining on 8 GPUs."""
    return pretrain(QWEN25_7B, seq_length=4096, micro_batch_size=4, activation_checkpointing="selective")


@model_recipe
def qwen25_14b() -> Recipe:
    """Qwen 2.5 14B, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(QWEN25_14B, seq_length=4096, num_nodes=2, micro_batch_size=16, activation_checkpointing="full")


@model_recipe
def qwen25_32b() -> Recipe:
    """Qwen 2.5 32B, pretraining on 4 nodes of 8 GPUs."""
    return pretrain(QWEN25_32B, seq_length=4096, num_nodes=4, micro_batch_size=8, activation_checkpointing="full")


@model_recipe
def qwen25_72b() -> Recipe:
    """Qwen 2.5 72B, pretraining on 8 nodes of 8 GPUs."""
    return pretrain(QWEN25_72B, seq_length=4096, num_nodes=8, micro_batch_size=4, activation_checkpointing="full")


@model_recipe
def qwen3_600m() -> Recipe:
    """Qwen 3 0.6B, pretraining on 8 GPUs."""
    return pretrain(QWEN3_600M, seq_length=4096, micro_batch_size=8)


@model_recipe
def qwen3_1p7b() -> Recipe:
    """Qwen 3 1.7B, pretraining on 8 GPUs."""
    return pretrain(QWEN3_1P7B, seq_length=4096, micro_batch_size=8)


@model_recipe
def qwen3_4b() -> Recipe:
    """Qwen 3 4B, pretraining on 8 GPUs."""
    return pretrain(QWEN3_4B, seq_length=4096, micro_batch_size=4, activation_checkpointing=0.9)


@model_recipe
def qwen3_8b() -> Recipe:
    """Qwen 3 8B, pretraining on 8 GPUs."""
    return pretrain(QWEN3_8B, seq_length=4096, micro_batch_size=4, activation_checkpointing="selective")


@model_recipe
def qwen3_14b() -> Recipe:
    """Qwen 3 14B, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(QWEN3_14B, seq_length=4096, num_nodes=2, micro_batch_size=16, activation_checkpointing="full")


@model_recipe
def qwen3_32b() -> Recipe:
    """Qwen 3 32B, pretraining on 4 nodes of 8 GPUs."""
    return pretrain(QWEN3_32B, seq_length=4096, num_nodes=4, micro_batch_size=8, activation_checkpointing="full")


@model_recipe
def qwen3_30b_a3b() -> Recipe:
    """Qwen 3 30B-A3B, 128 experts, 8 for each token, pretraining on 4 nodes of 8 GPUs."""
    return pretrain(QWEN3_30B_A3B, seq_length=4096, num_nodes=4, micro_batch_size=8, activation_checkpointing=0.5)
