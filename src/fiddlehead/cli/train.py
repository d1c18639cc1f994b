"""`fiddlehead pretrain`: from a recipe and edits to a run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import typer

from fiddlehead.cli.common import (
    AllowOption,
    OverridesArgument,
    add_row,
    complete_recipe,
    configure_executor,
    load_recipe,
    show,
    split_executor,
    table,
)
from fiddlehead.errors import ConfigError


def pretrain(
    overrides: list[str] = OverridesArgument,
    factory: str = typer.Option(
        ...,
        "--factory",
        "-f",
        metavar="RECIPE",
        help="A recipe's name, module:function or @file.yaml.",
        autocompletion=complete_recipe,
    ),
    dryrun: bool = typer.Option(False, "--dryrun", help="Check everything and show the plan; start nothing."),
    direct: bool = typer.Option(False, "--direct", help="Run in this process, without an executor."),
    detach: bool = typer.Option(False, "--detach", help="Return as soon as the job has started."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask before starting."),
    to_yaml: Path = typer.Option(None, "--to-yaml", metavar="FILE", help="Write the resolved recipe and stop."),
    allow: list[str] = AllowOption,
) -> None:
    """Train a language model from scratch, or continue an interrupted run.

    [bold]Edits[/bold] change the recipe, in the order given; values take the type of the field:

      trainer.max_steps=50   model.config.num_query_groups=1   optim.lr*=0.5   data=@data.yaml   log.name=first

    [bold]executor=NAME[/bold] says where it runs, executor.KEY=VALUE how:

      executor=local executor.ntasks_per_node=2

    The same log.name again continues that run from its newest checkpoint.

    Example:  fiddlehead pretrain --factory tiny trainer.max_steps=50 log.name=first
    """
    if direct and detach:
        raise ConfigError("--direct and --detach exclude each other: one stays in this process, the other leaves it")
    edits, executor_edits = split_executor(overrides or ())
    if direct and executor_edits:
        raise ConfigError(f"--direct runs without an executor; leave out {' '.join(executor_edits)}")
    recipe, name = load_recipe(factory, edits, allow or ())
    executor, executor_name = configure_executor(executor_edits)

    import fiddle as fdl

    from fiddlehead import launch, tasks

    if recipe.__fn_or_cls__ is not tasks.pretrain:
        task = recipe.__fn_or_cls__
        raise ConfigError(f"--factory {factory}: configures {task.__module__}:{task.__qualname__}, not a pretraining")
    plan = launch.check(launch.fit_to_executor(recipe, None if direct else executor))
    if to_yaml is not None:
        recipe.save(to_yaml)
        print(f"wrote {to_yaml}; run it with --factory @{to_yaml}")  # noqa: T201
        return
    where = "in this process" if direct else f"executor {executor_name}"
    _show_plan(name, where, plan)
    if dryrun:
        return
    if not yes and sys.stdin.isatty() and not typer.confirm("Start?", default=True):
        raise typer.Exit(0)
    try:
        run = launch.launch(
            recipe,
            None if direct else fdl.build(executor)(),
            name=name,
            detach=detach,
            allow=allow or (),
            command=_typed(),
        )
    except launch.RunFailedError as failure:
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(failure.status.exit_code or 1) from None
    if detach:
        print(f"started {run.path}; watch it with `fiddlehead runs logs {run.name} -f`")  # noqa: T201


def _typed() -> str:
    """The command line, without the values of environment variables: they may be secrets."""
    words = [re.sub(r"(env_vars\b[^=]*=).*", r"\1***", word, flags=re.DOTALL) for word in sys.argv[1:]]
    return shlex.join(["fiddlehead", *words])


def _show_plan(name: str, where: str, plan) -> None:
    made = table(name, where)
    for row in plan.rows():
        add_row(made, *row)
    show(made)
