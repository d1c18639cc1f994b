"""`fiddlehead recipes`, `show` and `diff`: looking at recipes."""

from __future__ import annotations

import json
import os
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import typer

from fiddlehead.cli.attention import DEFAULT_GPU
from fiddlehead.cli.common import (
    AllowOption,
    FactoryOption,
    WordsArgument,
    add_row,
    load_recipe,
    named_recipe,
    table,
)
from fiddlehead.cli.common import (
    show as show_things,
)
from fiddlehead.cli.completion import complete_recipe
from fiddlehead.errors import ConfigError
from fiddlehead.numbers import short
from fiddlehead.recipe import catalog


def recipes(
    pattern: str = typer.Argument(
        None,
        metavar="[PATTERN]",
        show_default=False,
        help="Part of a name, or a name with * and ?.",
        autocompletion=complete_recipe,
    ),
    long: bool = typer.Option(False, "--long", help="Also plan each one: parameters, devices, memory, speed, time."),
    as_json: bool = typer.Option(False, "--json", help="The same as --long, as JSON."),
) -> None:
    """List the recipes: yours in ./recipes first, then the built-in ones.

    Plans are for the GPU that the recipe names, or else for H100s of 80 GB, and take a fraction of a second each;
    `fiddlehead plan` makes one for other GPUs. A model's recipe also fine-tunes it: `fiddlehead finetune NAME`.

    Example:  fiddlehead recipes qwen --long
    """
    from rich.text import Text

    if as_json:
        print(json.dumps([_planned(entry) for entry in _matching(catalog.recipes(), pattern)], indent=1))  # noqa: T201
        return
    columns = ["name", "task", "where", "what"]
    made = table(*columns[:3], *(LONG if long else []), columns[3], optional=("where", "task"))
    for broken in catalog.broken_recipes() if pattern is None else []:
        where = f"{_short(broken.file)}{f':{broken.line}' if broken.line else ''}"
        add_row(made, Text("broken", style="red"), "", where, *([""] * len(LONG) if long else []), broken.problem)
    for entry in _matching(catalog.recipes(), pattern):
        planned = _planned(entry) if long else None
        extra = [] if planned is None else _figures(planned)
        where = f"{_short(entry.file)}:{entry.line}"
        task = f"{entry.task}, finetune" if entry.tunes else entry.task
        what = (planned or {}).get("problem", entry.summary)
        add_row(made, Text(entry.name, style="bold"), task, where, *extra, what)
    show_things(made)


def show(
    words: list[str] = WordsArgument,
    factory: str = FactoryOption,
    defaults: bool = typer.Option(False, "--defaults", help="Also show values that have their default."),
    yaml: bool = typer.Option(False, "--yaml", help="Print YAML, which @file.yaml reads back."),
    allow: list[str] = AllowOption,
) -> None:
    """Print a resolved recipe: every value, and where it was set.

    Example:  fiddlehead show tiny optim.lr=1e-3
    """
    from fiddlehead.recipe.leaves import leaves
    from fiddlehead.recipe.leaves import show as show_value

    factory, edits = named_recipe(factory, words or (), "show")
    loaded, _ = load_recipe(factory, edits, allow or ())
    if yaml:
        print(loaded.to_yaml(), end="")  # noqa: T201
        return
    made = table("path", "value", "set at")
    sources = loaded.sources()
    for leaf in leaves(loaded, defaults=defaults):
        if leaf.path:
            add_row(made, leaf.path, show_value(leaf.value), sources[leaf.path])
    show_things(made)


def diff(
    left: str = typer.Argument(metavar="RECIPE", help="A recipe, @file.yaml or a run.", autocompletion=complete_recipe),
    right: str = typer.Argument(
        metavar="RECIPE", help="Another recipe, @file.yaml or run.", autocompletion=complete_recipe
    ),
    allow: list[str] = AllowOption,
) -> None:
    """Print the differences between two recipes, YAML files or runs."""
    from fiddlehead.recipe.leaves import show as show_value

    one, _ = load_recipe(left, (), allow or ())
    other, _ = load_recipe(right, (), allow or ())
    differences = one.diff(other)
    if not differences:
        print(f"{left} and {right} are the same")  # noqa: T201
        return
    made = table("path", left, right)
    for difference in differences:
        add_row(made, difference.path or "(task)", show_value(difference.left), show_value(difference.right))
    show_things(made)


def _matching(entries: list[catalog.Entry], pattern: str | None) -> list[catalog.Entry]:
    """The entries whose name contains `pattern`, or matches it if it has wildcards; all if it is None."""
    if pattern is None:
        return entries
    like = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [entry for entry in entries if fnmatch(entry.name, like)]
    if not found:
        near = get_close_matches(pattern.strip("*"), [entry.name for entry in entries], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`fiddlehead recipes` lists all"
        raise ConfigError(f"no recipe is called {pattern!r}; {hint}")
    return found


LONG = ("parameters", "devices", "GiB a GPU", "tokens/s a GPU", "days")
"""The columns of --long."""


def _planned(entry: catalog.Entry) -> dict[str, Any]:
    """What a recipe is and takes, or the first problem if it cannot be planned; None is what is not known."""
    from fiddlehead.launch import plan
    from fiddlehead.plan.cards import CARDS

    found: dict[str, Any] = {"name": entry.name, "task": entry.task, "summary": entry.summary}
    try:
        function = entry.load()
        recipe, gpu = function(), getattr(function, "gpu", DEFAULT_GPU)
        trainer = recipe.trainer
        on_gpu = trainer.accelerator in ("gpu", "cuda")
        training = plan(recipe, target=CARDS[gpu] if on_gpu else "unknown").training
    except ConfigError as error:
        return found | {"problem": str(error.problems[0])}
    except Exception as error:  # a user's recipe; the others are still worth showing
        return found | {"problem": f"{type(error).__name__}: {error}"}
    memory, speed = training.memory, training.speed
    return found | {
        "parameters": training.parameters,
        "devices": f"{trainer.num_nodes} x {trainer.devices} {gpu if on_gpu else trainer.accelerator}",
        "gpu": gpu if on_gpu else None,
        "gpus": training.world_size if on_gpu else 0,
        "memory_gib": None if memory is None else memory.peak / 2**30,
        "fits": training.fits,
        "tokens_per_s": None if speed is None else speed.tokens_per_s,
        "hours": None if speed is None else speed.hours(training.max_steps),
    }


def _figures(planned: dict[str, Any]) -> list[str]:
    """The cells of `LONG`; empty for a recipe that cannot be planned."""
    if "problem" in planned:
        return [""] * len(LONG)
    cells = [short(planned["parameters"]), planned["devices"], "", "", ""]
    if planned["memory_gib"] is not None:
        cells[2] = f"{planned['memory_gib']:.1f}" + ("" if planned["fits"] else ", does not fit")
    if planned["tokens_per_s"] is not None:
        cells[3:] = [f"{planned['tokens_per_s'] / planned['gpus']:,.0f}", f"{planned['hours'] / 24:,.1f}"]
    return cells


def _short(file: Path) -> str:
    """The path relative to the working directory, if that is shorter."""
    relative = os.path.relpath(file)
    return min(relative, str(file), key=len)
