"""Microsoft's Phi-3 mini and Phi-4 (Abdin et al. 2024)."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain
from fiddlehead.recipes.model_recipe import model_recipe

PHI3_MINI = fdl.Config(
    TransformerConfig,
    num_layers=32,
    hidden_size=3072,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    vocab_size=32_064,
    window_size=(2046, 0),
)

PHI4 = fdl.Config(
    TransformerConfig,
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=17920,
    num_attention_heads=40,
    num_query_groups=10,
    vocab_size=100_352,
    rotary_base=250_000.0,
)


@model_recipe
def phi3_mini() -> Recipe:
    """Phi-3 mini, 3.8 B parameters, pretraining on 8 GPUs."""
    return pretrain(PHI3_MINI, seq_length=4096, micro_batch_size=4)


@model_recipe
def phi4() -> Recipe:
    """Phi-4, 14 B parameters, pretraining on 2 nodes of 8 GPUs."""
    return pretrain(PHI4, seq_length=4096, num_nodes=2, micro_batch_size=16, activation_checkpointing="full")
