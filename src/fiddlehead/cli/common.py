"""What several commands share: finding a recipe, applying what was typed, and tables."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from fiddlehead.cli.completion import complete_recipe, complete_words
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.recipe import catalog

if TYPE_CHECKING:
    from rich.table import Table

    from fiddlehead.launch.executor import Executor
    from fiddlehead.recipe import Recipe

EXECUTOR_PREFIXES = ("executor", "run.executor")


WordsArgument = typer.Argument(
    None,
    metavar="RECIPE [KEY=VALUE]...",
    show_default=False,
    help="A recipe's name, module:function, @file.yaml or a run; then edits, in this order.",
    autocompletion=complete_words,
)
FactoryOption = typer.Option(
    "",
    "--factory",
    "-f",
    metavar="RECIPE",
    show_default=False,
    help="The recipe, if it is not the first word.",
    autocompletion=complete_recipe,
)
AllowOption = typer.Option(
    None, "--allow", metavar="MODULE[:NAME]", help="Your names that YAML recipes and edits may use."
)

DespiteOption = typer.Option(
    None, "--despite", metavar="memory|time", help="Start although the plan says that it will run out of this."
)


def load_recipe(
    name: str, overrides: Sequence[str] = (), allow: Sequence[str] = (), *, task: str | None = None
) -> tuple[Recipe, str]:
    """Loads the recipe `name` and edits it; returns it with a name for its runs.

    `name` is a recipe function, `package.module:function`, either with arguments `name(argument=value)`, or
    `@file.yaml`, a YAML file, or a run. With the `task` "finetune", a model's name means the recipe that fine-tunes it.
    """
    import fiddle as fdl

    from fiddlehead.recipe import Recipe
    from fiddlehead.recipe.edits import apply_overrides, call_recipe
    from fiddlehead.run.names import find_run

    function_name, arguments = split_call(name)
    file = user_path(name.removeprefix("@"))
    if name.startswith("@") or file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise ConfigError(f"there is no file {file}")
        recipe, title = Recipe.load(file, allow=tuple(allow)), file.stem
        if title == "recipe":  # runs/NAME/recipe.yaml
            title = file.absolute().parent.name
    elif arguments is None and ":" not in name and not _is_recipe(name) and _is_run(name):
        run = find_run(name)
        recipe, title = Recipe.load(run.recipe, allow=tuple(allow)), run.name
    else:
        called = arguments is not None
        function = _call(lambda: catalog.find_recipe(function_name, called=called))
        if task == "finetune":
            function = getattr(function, "finetune_recipe", function)
        recipe, title = _call(lambda: call_recipe(function, arguments or "", allow)), function.__name__
        if not isinstance(recipe, Recipe):
            converted = isinstance(recipe, fdl.Buildable)
            hint = "; without NeMo-Run's autoconvert, which is for parts, the function returns one" * converted
            raise ConfigError(f"{name} returned a {type(recipe).__name__}, not a Recipe{hint}")
    return apply_overrides(recipe, list(overrides), find=catalog.find_part, allow=tuple(allow)), title


def split_call(text: str) -> tuple[str, str | None]:
    """The name and the arguments of ``name(argument=value)``; the arguments of a name alone are None."""
    match = re.fullmatch(r"([A-Za-z_][\w.:]*)\((.*)\)", text.strip(), re.DOTALL)
    return (match[1], match[2]) if match else (text, None)


def _is_recipe(name: str) -> bool:
    return any(entry.name == name for entry in catalog.recipes())


def named_recipe(factory: str, arguments: Sequence[str], command: str) -> tuple[str, list[str]]:
    """The recipe that --factory or else the first word names, and the edits."""
    if factory:
        return factory, list(arguments)
    if not arguments or ("=" in arguments[0] and split_call(arguments[0])[1] is None):
        raise ConfigError(f"which recipe? fiddlehead {command} RECIPE [KEY=VALUE]..., or --factory RECIPE")
    return arguments[0], list(arguments[1:])


def split_executor(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `executor=...` and `executor.x=...` from the edits of the recipe, and checks the form of each edit."""
    recipe, executor = [], []
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r} is not an edit: expected KEY=VALUE, such as trainer.max_steps=100")
        key = argument.split("=", 1)[0].rstrip("+-*/")
        ours = any(key == prefix or key.startswith(prefix + ".") for prefix in EXECUTOR_PREFIXES)
        (executor if ours else recipe).append(argument)
    return recipe, executor


def configure_executor(arguments: Sequence[str], default: str = "local") -> tuple[Executor, str]:
    """Builds the executor of `executor=NAME executor.x=1`; returns it and its name. Nothing starts, and nothing is
    asked.

    An edit sets the argument of that name of the executor's function, or else a setting of the executor that the
    function returns. If the function only passes settings on, every edit is a setting.
    """
    import fiddle as fdl

    from fiddlehead.launch.nemo.accept import accepted
    from fiddlehead.launch.nemo.settings import said_of
    from fiddlehead.recipe import Recipe
    from fiddlehead.recipe.edits import apply_overrides
    from fiddlehead.recipe.literals import split_arguments

    named, edits = [], []
    for argument in arguments:
        key, value = argument.split("=", 1)
        if key in EXECUTOR_PREFIXES:
            named.append(value)
        else:
            edits.append(argument.removeprefix("run.").removeprefix("executor."))
    if len(named) > 1:
        raise ConfigError(Problem("executor", named[1], f"discards the earlier {named[0]!r}; give only one of them"))
    name, call, rest = (named[0] if named else default).partition("(")  # executor=local(ntasks_per_node=2) works too
    if call:
        edits = split_arguments(rest.removesuffix(")")) + edits
    function = _call(lambda: catalog.find_executor(name))
    parameters = inspect.signature(function).parameters
    # A function that takes **settings passes them on as they are; they are then checked all at once.
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    required = _required(parameters)
    taken = required if passes_on else parameters
    keys = {edit: re.split(r"[-+*/]?=|[.\[]", edit)[0] for edit in edits}
    own = [edit for edit, key in keys.items() if key in taken]
    missing = [parameter for parameter in required if parameter not in keys.values()]
    refuse(Problem(f"executor.{parameter}", message=f"{name} needs it") for parameter in missing)
    try:
        executor = accepted(_call(fdl.build(apply_overrides(Recipe(function), own))))
        if executor is None:
            raise ConfigError(f"{name} returned None, not an executor")
        present = {field.name: getattr(executor, field.name) for field in fields(executor)}
        edits = [edit for edit in edits if edit not in own]
        refuse(
            Problem(keys[edit], message=f"is a field of NeMo-Run's executor; here it is {said}")
            for edit in edits
            if keys[edit] not in present and (said := said_of(executor.kind, keys[edit]))
        )
        settings = apply_overrides(Recipe(type(executor), **present), edits)
        return fdl.build(settings)(), name
    except ConfigError as error:
        raise error.under("executor") from None


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The parameters that a call must give."""
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in various
    ]


def table(*columns: str, optional: Sequence[str] = (), notes: bool = False) -> Table:
    """An empty table in the one style that every command uses; the arguments are those of `FittedTable`."""
    from fiddlehead.cli.tables import FittedTable

    return FittedTable(*columns, optional=optional, notes=notes)


def add_row(table: Table, *cells: Any) -> None:
    """Adds a row of plain texts: a name that a user chose must not be read as markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def phases_table(metrics: Mapping[str, float]) -> Table:
    """A table of a step's phases, from the metrics of a run: milliseconds, share and a bar for each phase."""
    total = metrics["seconds_per_step"]
    found = {name: metrics[f"seconds_{name}"] for name in ("data", "forward", "backward", "optimizer")}
    found["the rest"] = max(0.0, total - sum(found.values()))
    communication = metrics.get("seconds_communication")
    made = table("a step", f"{1000 * total:,.1f} ms", "", "")
    made.columns[1].justify = made.columns[2].justify = "right"
    for name, seconds in found.items():
        add_row(made, name, f"{1000 * seconds:,.1f} ms", f"{seconds / total:.0%}", "#" * round(40 * seconds / total))
        if name == "backward" and communication is not None:
            part = f"{1000 * communication:,.1f} ms", f"{communication / total:.0%}"
            add_row(made, "  of it waiting for gradients", *part, "~" * round(40 * communication / total))
    return made


def show(*things: Any) -> None:
    """Prints tables and texts: in colour on a terminal that has colours; a pipe's lines are long, if not COLUMNS says
    otherwise."""
    from rich.console import Console

    console = Console(width=width_of(sys.stdout), highlight=False, soft_wrap=True)
    for thing in things:
        console.print(thing)


def width_of(stream: TextIO, piped: int = 200) -> int:
    """The columns of a terminal; `piped` if the stream is none, and COLUMNS does not say otherwise."""
    size = shutil.get_terminal_size((piped, 24))
    return size.columns if stream.isatty() or "COLUMNS" in os.environ else piped


def _call(function: Callable[[], Any]) -> Any:
    """Calls `function`. An error in the user's code is reported with its file and line, without a traceback."""
    try:
        return function()
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())]
        if not theirs:
            raise
        from fiddlehead.recipe.nemo_names import explain

        place = f"{theirs[-1].filename}:{theirs[-1].lineno}"
        raise ConfigError(Problem.in_file(place, explain(error))) from error


def _is_run(name: str) -> bool:
    from fiddlehead.run.names import find_run

    try:
        find_run(name)
    except ConfigError:
        return False
    return True
