"""Models that train on two CPU cores: the demo, and the recipe of the tests."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.data import BPETokenizer, ByteTokenizer
from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import pretrain, uptrain
from fiddlehead.recipes.model_recipe import model_recipe
from fiddlehead.training import WarmupStableDecay


@model_recipe
def tiny() -> Recipe:
    """A GQA model of 0.9 M parameters, trained on Python's standard library in about a minute on two cores."""
    recipe = pretrain(
        model=fdl.Config(
            TransformerConfig,
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=352,
            num_attention_heads=4,
            num_query_groups=2,
            share_embeddings_and_output_weights=True,
        ),
        seq_length=128,
        micro_batch_size=16,
        global_batch_size=16,
        max_steps=400,
        lr=4e-3,
        accelerator="cpu",
        devices="auto",
        precision="32-true",
    )
    recipe.data.corpus = "stdlib"
    recipe.data.tokenizer = fdl.Config(BPETokenizer, vocab_size=1024)
    recipe.optim.lr_scheduler = fdl.Config(WarmupStableDecay, warmup_steps=20, decay_fraction=0.3)
    recipe.trainer.val_check_interval = 100
    recipe.checkpoint.every_n_steps = 100
    return recipe


@model_recipe
def tiny_mqa() -> Recipe:
    """The demo with one key/value head for all query heads (multi-query attention)."""
    recipe = tiny()
    recipe.model.config.num_query_groups = 1
    return recipe


@model_recipe
def tiny_mha() -> Recipe:
    """The demo with as many key/value heads as query heads (multi-head attention)."""
    recipe = tiny()
    recipe.model.config.num_query_groups = None
    return recipe


@model_recipe
def tiny_uptrain() -> Recipe:
    """The continuation of a converted demo, for 5 % of its steps; set model.init_from."""
    return uptrain(tiny(), "converted")


@model_recipe
def tiny_test() -> Recipe:
    """30 steps of a two-layer model on bytes, in a few seconds."""
    recipe = tiny()
    config = recipe.model.config
    config.num_layers, config.hidden_size, config.ffn_hidden_size = 2, 32, 64
    recipe.data.tokenizer = fdl.Config(ByteTokenizer)
    recipe.data.seq_length = 32
    recipe.data.micro_batch_size, recipe.data.global_batch_size = 4, 8
    recipe.data.val_samples = 8
    recipe.trainer.max_steps = 30
    recipe.trainer.log_every_n_steps = 1
    recipe.trainer.val_check_interval = 10
    recipe.optim.lr_scheduler.warmup_steps = 5
    recipe.checkpoint.every_n_steps = 10
    return recipe
