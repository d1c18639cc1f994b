"""Meta's Llama 3 family (Grattafiori et al. 2024)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import RopeScaling, TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain

LLAMA3_8B = fdl.Config(
    TransformerConfig,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,  # also where the data's tokenizer has fewer: the shapes are Llama's
    rotary_base=500_000.0,
)

LLAMA32_1B = fdl.Config(
    TransformerConfig,
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    rotary_base=500_000.0,
    rope_scaling=fdl.Config(RopeScaling, scale_factor=32.0),
    share_embeddings_and_output_weights=True,
)


def llama3_8b() -> Recipe:
    """Llama 3 8B, pretraining on 8 GPUs.

    Each GPU holds all parameters, gradients and optimizer state, 120 GiB and the activations: 80 GB are too few.
    """
    return pretrain(model=LLAMA3_8B, seq_length=8192, global_batch_size=512, max_steps=1_168_251, lr=3e-4, devices=8)


def llama3_8b_64k() -> Recipe:
    """Llama 3 8B on sequences of 65,536 tokens."""
    recipe = llama3_8b()
    recipe.data.seq_length = 65536
    return recipe


def llama32_1b() -> Recipe:
    """Llama 3.2 1B, pretraining on 8 GPUs."""
    return pretrain(model=LLAMA32_1B, seq_length=8192, global_batch_size=512, max_steps=1_168_251, lr=3e-4, devices=8)
