"""OpenAI's GPT-2 (Radford et al. 2019), GPT-3 (Brown et al. 2020) and gpt-oss (2025)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig, YarnRopeScaling
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

GPT2_124M = fdl.Config(
    TransformerConfig,
    num_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    vocab_size=50_257,
    normalization="LayerNorm",
    activation="gelu",
    position_embedding_type="learned_absolute",
    add_bias_linear=True,
    share_embeddings_and_output_weights=True,
    attention_dropout=0.1,
    hidden_dropout=0.1,
)

GPT2_355M = fdl.copy_with(GPT2_124M, num_layers=24, hidden_size=1024, num_attention_heads=16)

GPT2_774M = fdl.copy_with(GPT2_124M, num_layers=36, hidden_size=1280, num_attention_heads=20)

GPT2_1P5B = fdl.copy_with(GPT2_124M, num_layers=48, hidden_size=1600, num_attention_heads=25)

GPT3_175B = fdl.copy_with(
    GPT2_124M, num_layers=96, hidden_size=12288, num_attention_heads=96, attention_dropout=0.0, hidden_dropout=0.0
)

GPT_OSS_20B = fdl.Config(
    TransformerConfig,
    num_layers=24,
    hidden_size=2880,
    ffn_hidden_size=2880,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=201_088,
    activation="clamped_swiglu",
    add_bias_linear=True,
    attention_sinks=True,
    window_size=(127, 0),
    window_attn_skip_freq=2,
    rotary_base=150_000.0,
    rope_scaling=fdl.Config(YarnRopeScaling, scale_factor=32.0, old_context_len=4096, truncate=False),
    num_moe_experts=32,
    moe_router_topk=4,
    moe_aux_loss_coeff=0.15,  # transformers' router_aux_loss_coef of 0.9, x topk / layers
)


@model_recipe
def gpt2_124m() -> Recipe:
    """GPT-2 with 124 M parameters, pretraining on 8 GPUs."""
    return pretrain(GPT2_124M, seq_length=1024, lr=6e-4, micro_batch_size=32)


@model_recipe
def gpt2_355m() -> Recipe:
    """GPT-2 with 355 M parameters, pretraining on 8 GPUs."""
    return pretrain(GPT2_355M, seq_length=1024, lr=3e-4, micro_batch_size=32)


@model_recipe
def gpt2_774m() -> Recipe:
    """GPT-2 with 774 M parameters, pretraining on 8 GPUs."""
    return pretrain(GPT2_774M, seq_length=1024, lr=2.5e-4, micro_batch_size=32)


@model_recipe
def gpt2_1p5b() -> Recipe:
    """GPT-2 with 1.5 B parameters, pretraining on 8 GPUs."""
    return pretrain(GPT2_1P5B, seq_length=1024, lr=2e-4, micro_batch_size=16)


@model_recipe
def gpt3_175b() -> Recipe:
    """GPT-3 175B, pretraining on 64 nodes of 8 GPUs."""
    return pretrain(
        GPT3_175B,
        seq_length=2048,
        global_batch_size=1536,
        lr=6e-5,
        num_nodes=64,
        micro_batch_size=12,
        activation_checkpointing="full",
        tensor_parallel=4,
    )


@model_recipe
def gpt_oss_20b() -> Recipe:
    """gpt-oss 20B, 32 experts, 4 for each token, pretraining on 4 nodes of 8 GPUs."""
    return pretrain(GPT_OSS_20B, seq_length=4096, num_nodes=4, micro_batch_size=8, activation_checkpointing=0.5)
