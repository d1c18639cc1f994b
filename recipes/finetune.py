"""Fine-tuning recipes for every model: its shape and its tokenizer come with the weights."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.models import LoRA
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.base import finetune
from fiddlehead.training import PreferenceModel


def full() -> Recipe:
    """All weights are trained on answers; set model.init_from and data.paths."""
    return finetune(lr=1e-5)


def lora() -> Recipe:
    """Low-rank adapters are trained on answers, in a fraction of the memory."""
    recipe = finetune(lr=2e-4)
    recipe.model.lora = fdl.Config(LoRA)
    recipe.optim.weight_decay = 0.0
    return recipe


def dora() -> Recipe:
    """As lora, but the lengths of the weights' rows are trained separately from their directions."""
    recipe = lora()
    recipe.model.lora.dora = True
    return recipe


def qlora() -> Recipe:
    """As lora, but the frozen weights are stored in 4 bits (NF4), for a quarter of their memory."""
    recipe = lora()
    recipe.model.lora.quantize_base = "nf4"
    return recipe


def dpo() -> Recipe:
    """Adapters are trained on pairs of answers, of which one is better (direct preference optimization)."""
    recipe = lora()
    del recipe.model.compile  # answers are compared whole, whatever their length
    fdl.update_callable(recipe.model, PreferenceModel)
    recipe.data.preference = True
    recipe.optim.lr = 5e-5
    recipe.optim.lr_scheduler.min_lr = 5e-6
    return recipe
