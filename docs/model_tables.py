"""Writes the tables of docs/models.md from the plans of the recipes: `python docs/model_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fiddlehead import launch
from fiddlehead.plan.cards import CARDS
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipes.layouts import FINETUNING

PAGE = Path(__file__).with_name("models.md")
PRETRAINING = "| recipe | GPUs | GiB a GPU | tokens/s a GPU | days |\n|---|---|---|---|---|"
TUNING = (
    "| recipe | all weights: GPUs | GiB a GPU | tokens/s a GPU | LoRA: GPUs | GiB a GPU | tokens/s a GPU |\n"
    "|---|---|---|---|---|---|---|"
)


def planned(recipe: Recipe) -> Any:
    """The plan of a recipe's training on H100s."""
    return launch.plan(recipe, target=CARDS["h100"]).training


def row(name: str, plan: Any) -> str:
    """The row of a pretraining recipe."""
    days = plan.speed.hours(plan.max_steps) / 24
    return f"| `{name}` | {' | '.join(_figures(plan))} | {days:,.{0 if days >= 10 else 1}f} |"


def tuning_row(name: str, full: Any, lora: Any) -> str:
    """The row of a model's fine-tuning recipe."""
    return f"| `{name}` | {' | '.join(_figures(full) + _figures(lora))} |"


def _figures(plan: Any) -> list[str]:
    rate = plan.speed.tokens_per_s / plan.world_size
    return [f"{plan.world_size:,}", f"{plan.memory.peak / 2**30:.0f}", f"{float(f'{rate:.2g}'):,.0f}"]


def tables() -> dict[str, str]:
    """Each table in Markdown, by the name that its place in the page has."""
    entries = {entry.name: entry.load() for entry in catalog.recipes() if entry.module.startswith("fiddlehead.")}
    trained = {name: make() for name, make in entries.items() if hasattr(make, "finetune_recipe")}
    on_gpus = {name: recipe for name, recipe in trained.items() if recipe.trainer.accelerator == "gpu"}
    tuned = {name: [entries[name].finetune_recipe(peft_scheme=s) for s in (None, "lora")] for name in FINETUNING}
    return {
        "pretraining": "\n".join([PRETRAINING, *(row(name, planned(recipe)) for name, recipe in on_gpus.items())]),
        "fine-tuning": "\n".join([TUNING, *(tuning_row(name, *map(planned, both)) for name, both in tuned.items())]),
    }


def filled(page: str) -> str:
    """The page with its tables as they are now: each between `<!-- table NAME -->` and `<!-- end NAME -->`."""
    for name, made in tables().items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        page = place.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
