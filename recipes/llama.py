"""Meta's Llama family (Touvron et al. 2023, Grattafiori et al. 2024)."""

from __future__ import annotations

from typing import Any

import fiddle as fdl

from fiddlehead.models import RopeScaling, TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import laid_out, pretrain
from fiddlehead.recipes.model_recipe import model_recipe

LLAMA2_7B = fdl.Config(
    TransformerConfig,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    vocab_size=32_000,
)

LLAMA2_13B = fdl.copy_with(LLAMA2_7B, num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)

LLAMA2_70B = fdl.copy_with(
    LLAMA2_7B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8
)

LLAMA3_8B = fdl.Config(
    TransformerConfig,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128_256,
    rotary_base=500_000.0,
)

LLAMA3_70B = fdl.copy_with(LLAMA3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)

LLAMA31_8B = fdl.copy_with(LLAMA3_8B, rope_scaling=fdl.Config(RopeScaling))

LLAMA31_70B = fdl.copy_with(LLAMA3_70B, rope_scaling=fdl.Config(RopeScaling))

LLAMA31_405B = fdl.copy_with(
    LLAMA31_8B, num_layers=126, hidden_size=16384, ffn_hidden_size=53248, num_attention_heads=128
)

LLAMA32_1B = fdl.copy_with(
    LLAMA3_8B,
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    rope_scaling=fdl.Config(RopeScaling, scale_factor=32.0),
    share_embeddings_and_output_weights=True,
)

LLAMA32_3B = fdl.copy_with(LLAMA32_1B, num_layers=28, hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24)


@model_recipe
def llama2_7b() -> Recipe:
    """Llama 2 7B, pretraining on 8 GPUs."""
    return pretrain(LLAMA2_7B, seq_length=4096, micro_batch_size=4, activation_checkpointing=0.9)


@model_recipe
def llama2_13b() -> Recipe:
    """Llama 2 13B, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(LLAMA2_13B, seq_length=4096, num_nodes=2, micro_batch_size=16, activation_checkpointing="full")


@model_recipe
def llama2_70b() -> Recipe:
    """Llama 2 70B, pretraining on 8 nodes of 8 GPUs."""
    return pretrain(
        LLAMA2_70B, seq_length=4096, lr=0.00015, num_nodes=8, micro_batch_size=4, activation_checkpointing="full"
    )


@model_recipe
def llama3_8b() -> Recipe:
    """Llama 3 8B, pretraining on 8 GPUs.

    Its peak on each GPU is 68 GiB; `fiddlehead plan llama3_8b` shows the parts.
    """
    return pretrain(
        LLAMA3_8B, seq_length=8192, max_steps=1_168_251, micro_batch_size=2, activation_checkpointing="selective"
    )


@model_recipe
def llama3_8b_16k() -> Recipe:
    """Llama 3 8B on sequences of 16,384 tokens."""
    return _longer(llama3_8b(), 16384, activation_checkpointing="selective")


@model_recipe
def llama3_8b_64k() -> Recipe:
    """Llama 3 8B on sequences of 65,536 tokens."""
    return _longer(llama3_8b(), 65536, activation_checkpointing="selective", context_parallel=4)


@model_recipe
def llama3_70b() -> Recipe:
    """Llama 3 70B, pretraining on 8 nodes of 8 GPUs."""
    return pretrain(
        LLAMA3_70B,
        seq_length=8192,
        lr=0.00015,
        max_steps=1_168_251,
        num_nodes=8,
        micro_batch_size=2,
        activation_checkpointing="full",
    )


@model_recipe
def llama3_70b_16k() -> Recipe:
    """Llama 3 70B on sequences of 16,384 tokens."""
    return _longer(llama3_70b(), 16384, activation_checkpointing="full")


@model_recipe
def llama3_70b_64k() -> Recipe:
    """Llama 3 70B on sequences of 65,536 tokens."""
    return _longer(llama3_70b(), 65536, activation_checkpointing="full", tensor_parallel=4)


@model_recipe
def llama31_8b() -> Recipe:
    """Llama 3.1 8B, pretraining on 8 GPUs."""
    return pretrain(LLAMA31_8B, seq_length=8192, micro_batch_size=2, activation_checkpointing="selective")


@model_recipe
def llama31_8b_128k() -> Recipe:
    """Llama 3.1 8B on sequences of 131,072 tokens."""
    return _longer(llama31_8b(), 131072, activation_checkpointing="selective", context_parallel=8)


@model_recipe
def llama31_70b() -> Recipe:
    """Llama 3.1 70B, pretraining on 8 nodes of 8 GPUs."""
    return pretrain(
        LLAMA31_70B, seq_length=8192, lr=0.00015, num_nodes=8, micro_batch_size=2, activation_checkpointing="full"
    )


@model_recipe
def llama31_405b() -> Recipe:
    """Llama 3.1 405B, pretraining on 72 nodes of 8 GPUs."""
    return pretrain(
        LLAMA31_405B,
        seq_length=8192,
        lr=8e-05,
        global_batch_size=576,
        num_nodes=72,
        micro_batch_size=4,
        activation_checkpointing="full",
        tensor_parallel=4,
    )


@model_recipe
def llama32_1b() -> Recipe:
    """Llama 3.2 1B, pretraining on 8 GPUs."""
    return pretrain(LLAMA32_1B, seq_length=8192, max_steps=1_168_251, micro_batch_size=4)


@model_recipe
def llama32_3b() -> Recipe:
    """Llama 3.2 3B, pretraining on 8 GPUs."""
    return pretrain(LLAMA32_3B, seq_length=8192, micro_batch_size=2)


def _longer(recipe: Recipe, seq_length: int, **layout: Any) -> Recipe:
    recipe.data.seq_length = seq_length
    return laid_out(recipe, **layout)
