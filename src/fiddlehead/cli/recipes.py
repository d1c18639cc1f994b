"""`fiddlehead recipes`, `show` and `diff`: looking at recipes."""

from __future__ import annotations

import os
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

import typer

from fiddlehead.cli.common import (
    AllowOption,
    OverridesArgument,
    add_row,
    complete_recipe,
    load_recipe,
    table,
)
from fiddlehead.cli.common import (
    show as show_things,
)
from fiddlehead.errors import ConfigError
from fiddlehead.recipe import catalog


def recipes(
    pattern: str = typer.Argument(
        None, show_default=False, help="Part of a name, or a name with * and ?.", autocompletion=complete_recipe
    ),
    long: bool = typer.Option(False, "--long", help="Also build each one: parameters and devices (takes seconds)."),
) -> None:
    """List the recipes: yours in ./recipes first, then the built-in ones.

    Example:  fiddlehead recipes qwen
    """
    from rich.text import Text

    columns = ["name", "task", "where", "what"]
    made = table(*columns[:3], *(["parameters", "devices"] if long else []), columns[3])
    for broken in catalog.broken_recipes() if pattern is None else []:
        where = f"{_short(broken.file)}{f':{broken.line}' if broken.line else ''}"
        add_row(made, Text("broken", style="red"), "", where, *([""] * 2 if long else []), broken.problem)
    for entry in _matching(catalog.recipes(), pattern):
        extra = _measure(entry) if long else []
        where = f"{_short(entry.file)}:{entry.line}"
        add_row(made, Text(entry.name, style="bold"), entry.task, where, *extra, entry.summary)
    show_things(made)


def show(
    recipe: str = typer.Argument(help="A recipe, @file.yaml or a run.", autocompletion=complete_recipe),
    overrides: list[str] = OverridesArgument,
    defaults: bool = typer.Option(False, "--defaults", help="Also show values that have their default."),
    yaml: bool = typer.Option(False, "--yaml", help="Print YAML, for --factory @file.yaml."),
    allow: list[str] = AllowOption,
) -> None:
    """Print a resolved recipe: every value, and where it was set.

    Example:  fiddlehead show tiny optim.lr=1e-3
    """
    from fiddlehead.recipe.leaves import leaves
    from fiddlehead.recipe.leaves import show as show_value

    loaded, _ = load_recipe(recipe, overrides or (), allow or ())
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
    left: str = typer.Argument(help="A recipe, @file.yaml or a run.", autocompletion=complete_recipe),
    right: str = typer.Argument(help="Another recipe, @file.yaml or run.", autocompletion=complete_recipe),
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


def _measure(entry: catalog.Entry) -> list[str]:
    """Parameters and devices of a recipe, or the first problem if it cannot be built here."""
    from fiddlehead.launch import plan

    try:
        recipe = entry.load()()
        parameters = plan(recipe, target="unknown").training.parameters
    except ConfigError as error:
        return [error.problems[0], ""]
    except Exception as error:  # a user's recipe; the others are still worth showing
        return [f"{type(error).__name__}: {error}", ""]
    trainer = recipe.trainer
    return [f"{parameters / 1e6:,.2f} M", f"{trainer.num_nodes} x {trainer.devices} {trainer.accelerator}"]


def _short(file: Path) -> str:
    """The path relative to the working directory, if that is shorter."""
    relative = os.path.relpath(file)
    return min(relative, str(file), key=len)
