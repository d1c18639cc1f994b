"""`fiddlehead plan`: what a run takes, here or on GPUs that are elsewhere."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import typer

from fiddlehead.cli.attention import DEFAULT_GPU
from fiddlehead.cli.common import (
    AllowOption,
    FactoryOption,
    WordsArgument,
    add_row,
    configure_executor,
    load_recipe,
    named_recipe,
    show,
    split_executor,
    table,
)
from fiddlehead.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fiddlehead.launch import Plan
    from fiddlehead.plan.cards import Card
    from fiddlehead.plan.layouts import Layout
    from fiddlehead.recipe import Recipe

SHOWN = 10
"""How many layouts --fit shows."""
HELP = """Show what a run takes before it starts: memory, speed, time, kernels.

It needs no GPU, no cluster and no dataset. The memory is that of the GPU that has most of it, at the moment when it \
has most. The speed is worked out from the GPU's data sheet, and from the part of it that an H100 was measured to reach.

[bold]--gpu[/bold] is the GPU to plan for: h100, h200, a100, a100_40, l40s, b200, b300, rtx4090 and others, which the \
error for a wrong name lists; or one of your own, by its memory, the speed of its products and that of its memory: \
--gpu mine=48,362,864 (GiB,TFLOPs,GB/s)

Example:  fiddlehead plan llama3_8b --gpu h200

Example:  fiddlehead plan llama3_8b executor=slurm executor.partition=gpu --script

Example:  fiddlehead plan llama3_70b model.activation_checkpointing=full trainer.num_nodes=8 --usd-per-gpu-hour 2.5
"""


def plan(
    words: list[str] = WordsArgument,
    factory: str = FactoryOption,
    gpu: str = typer.Option(None, "--gpu", metavar="NAME", help="Plan for this GPU, which need not be here."),
    fit: bool = typer.Option(False, "--fit", help="Search the layouts that fit, and show the ten fastest."),
    usd: float = typer.Option(None, "--usd-per-gpu-hour", min=0.0, help="Also say what the run costs."),
    script: bool = typer.Option(
        False, "--script", help="Print the scripts that executor=NAME would submit instead; secrets are not in them."
    ),
    as_json: bool = typer.Option(False, "--json", help="The plan as JSON; `fits` is true, false or null."),
    allow: list[str] = AllowOption,
) -> None:
    """Show what a run takes before it starts: memory, speed, time, kernels."""
    factory, edits = named_recipe(factory, words or (), "plan")
    edits, executor_edits = split_executor(edits)
    recipe, name = load_recipe(factory, edits, allow or ())
    from fiddlehead import launch

    card = named_card(DEFAULT_GPU if gpu is None and _needs_gpu(recipe) else gpu)
    executor, where = configure_executor(executor_edits) if executor_edits else (None, "")
    found = launch.search(recipe, executor, target=card) if fit else []
    planned, changes = launch.plan(recipe, executor, target=card), []
    if planned.problems and found:  # the recipe's own layout is none for these GPUs
        changes = fitted_rows(found[0])
        planned = launch.plan(launch.fitted(recipe, found[0]), executor, target=card)
    planned.refuse_problems()
    scripts = planned.scripts(name=name, allow=allow or ()) if script else {}
    if as_json:
        values = _values(name, planned, usd, found)
        print(json.dumps({**values, "scripts": scripts} if script else values, indent=1))  # noqa: T201
        return
    if script:
        show_scripts(scripts)
        return
    rows = [*planned.rows(name=name, usd_per_gpu_hour=usd), *changes]
    if card is not None and gpu is None:
        rows.append(("", f"planned for {DEFAULT_GPU}, as there is no GPU here; --gpu names another"))
    on = f"on {card.name}" if card is not None else "here"
    show_plan(name, f"{on}, executor {where}" if where else on, rows)
    if fit:
        _show_layouts(found[:SHOWN])


def named_card(gpu: str | None) -> Card | None:
    """The GPU that --gpu names."""
    if gpu is None:
        return None
    from fiddlehead.plan.cards import Card

    try:
        return Card.parse(gpu)
    except ConfigError as error:
        raise ConfigError(
            *(Problem(f"--{each.path}", each.given, each.message, each.allowed) for each in error.problems)
        ) from error


def fitted_rows(layout: Layout) -> list[tuple[str, str]]:
    """What --fit has changed of a recipe, as a section of a plan's rows."""
    from fiddlehead.plan.rows import as_rows

    return as_rows({"--fit": layout.edits or ["the recipe's own layout is the fastest"]})


def show_plan(name: str, where: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints a plan's table."""
    made = table(name, where)
    for row in rows:
        add_row(made, *row)
    show(made)


def show_scripts(scripts: Mapping[str, str]) -> None:
    """Prints the texts of `Plan.scripts`."""
    for file, text in scripts.items():
        print(f"=== {file}\n{text}")  # noqa: T201


def _needs_gpu(recipe: Recipe) -> bool:
    """Whether it trains on GPUs, and none is here."""
    if recipe.trainer.accelerator not in ("gpu", "cuda"):
        return False
    import torch

    return not torch.cuda.is_available()


def _show_layouts(found: Sequence[Layout]) -> None:
    made = table("layouts that fit, fastest first", "tokens/s", "GiB a GPU")
    for each in found:
        edits = shlex.join(each.edits) or "the recipe as it is"
        rate = f"{each.speed.tokens_per_s:,.0f}" if each.speed is not None else ""
        add_row(made, edits, rate, f"{each.memory.needed_gib:.1f}")
    show(made)


def _values(name: str, planned: Plan, usd: float | None, found: Sequence[Layout]) -> dict[str, Any]:
    training, values = planned.training, planned.to_dict()
    return {
        "name": name,
        "fits": training.fits,
        "usd": None if usd is None or training.gpu_hours is None else usd * training.gpu_hours,
        "layouts": [each.to_dict() for each in found[:SHOWN]],
        **values.pop("training"),
        **values,
        "where": str(planned.run_directory(name).path),
    }
