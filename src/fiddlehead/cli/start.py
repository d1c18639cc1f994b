"""Starts the run that was asked for on the command line."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fiddlehead.cli.after import in_queue_of, unfinished, wait_for
from fiddlehead.cli.common import load_recipe
from fiddlehead.cli.ending import say_ending, say_failure
from fiddlehead.cli.plan import fitted_rows, named_card, show_plan, show_scripts
from fiddlehead.errors import ConfigError, Problem

if TYPE_CHECKING:
    from fiddlehead.launch import Plan
    from fiddlehead.launch.executor import Executor
    from fiddlehead.recipe import Recipe
    from fiddlehead.run.directory import RunDirectory


@dataclass(frozen=True)
class Request:
    """What was asked of `fiddlehead pretrain` or `finetune`, of one run as of a sweep."""

    task: str
    factory: str
    """The recipe's name, as typed."""
    edits: Sequence[str]
    executor: Executor
    executor_name: str
    dryrun: bool
    detach: bool
    yes: bool
    allow: Sequence[str]
    despite: Sequence[str]

    @property
    def where(self) -> str:
        """The executor, in words."""
        return f"executor {self.executor_name}"

    def load(self, edits: Sequence[str]) -> tuple[Recipe, str]:
        """The recipe with these edits, and a name for its runs.

        Raises:
            ConfigError: it cannot be loaded, or it is for another command.
        """
        recipe, name = load_recipe(self.factory, edits, self.allow, task=self.task)
        _refuse_other_tasks(recipe, self.factory, self.task)
        return recipe, name

    def confirm(self) -> None:
        """Asks on a terminal whether to start, and ends the command if the answer is no."""
        if not self.yes and sys.stdin.isatty() and not typer.confirm("Start?", default=True):
            raise typer.Exit(0)


def start_run(
    request: Request,
    planned: Executor | None,
    *,
    gpu: str | None,
    fit: bool,
    direct: bool,
    to_yaml: Path | None,
    script: bool,
    after: Sequence[str],
) -> None:
    """Plans one run, shows the plan, and starts the run unless the request says otherwise.

    Args:
        planned: the executor that the plan is for; None plans for this process, or for `gpu`.
        script: also print the scripts that would be submitted.
        after: the names of runs that have to succeed before.
    """
    from fiddlehead import launch

    with _pointing_to_sweep(request.edits):
        recipe, name = request.load(request.edits)
        before = unfinished(after, recipe.log.dir)
        card = named_card(gpu)
        changes = []
        if fit:
            layout = launch.search(recipe, planned, target=card)[0]
            recipe, changes = launch.fitted(recipe, layout), fitted_rows(layout)
        plan = launch.plan(recipe, planned, target=card, waits=bool(before))
        plan.refuse_problems()
    if to_yaml is not None:
        _write_yaml(plan, recipe, to_yaml, request.task, changes)
        return
    if not request.dryrun:
        plan.refuse_start(request.despite)
    where = "in this process" if direct else f"on {gpu}" if gpu is not None and planned is None else request.where
    scripts = plan.scripts(name=name, allow=request.allow) if script else {}
    show_plan(name, where, [*plan.rows(name=name), *changes])
    show_scripts(scripts)
    if request.dryrun:
        if shipped := plan.dry_run():
            print(shipped.replace("shipped", "would ship"))  # noqa: T201
        plan.refuse_unfit(request.despite)
        return
    request.confirm()
    queued = [run for run in before if in_queue_of(run, request.executor)]
    here = [run for run in before if run not in queued]
    if here and request.detach:
        names = ", ".join(run.name for run in here)
        said = f"{request.where} cannot wait for {names}, so this command has to stay and do it"
        raise ConfigError(Problem("--after --detach", message=said))
    wait_for(here)
    _submit(plan, name, request, queued)


def _write_yaml(plan: Plan, recipe: Recipe, file: Path, task: str, changes: Sequence[tuple[str, str]]) -> None:
    recipe.save(file)
    print(f"wrote {file}; run it with fiddlehead {task} @{file}")  # noqa: T201
    for option, edit in changes:
        print(f"{option}: {edit}")  # noqa: T201
    for reason in plan.missing:
        print(f"it cannot start yet: {reason}", file=sys.stderr)  # noqa: T201


def _submit(plan: Plan, name: str, request: Request, queued: Sequence[RunDirectory]) -> None:
    """Starts the run, and says how it ended unless it was detached."""
    from fiddlehead import launch

    options = {"allow": request.allow, "despite": request.despite, "command": typed_command(), "after": queued}
    try:
        run = plan.submit(name=name, detach=request.detach, **options)
    except launch.RunFailedError as failure:
        say_failure(failure)
        raise typer.Exit(failure.status.exit_code or 1) from None
    if not request.detach:
        say_ending(run, run.status())
    else:
        print(f"started {run.path}; watch it with `fiddlehead runs logs {run.name} -f`")  # noqa: T201


def typed_command() -> str:
    """The command line without the values of environment variables, which may be secrets."""
    words = [re.sub(r"(env_vars\b[^=]*=).*", r"\1***", word, flags=re.DOTALL) for word in sys.argv[1:]]
    return shlex.join(["fiddlehead", *words])


def _refuse_other_tasks(recipe: Recipe, factory: str, typed: str) -> None:
    """Raises ConfigError if the command that was typed is not the one for the recipe's task."""
    from fiddlehead import tasks

    task = recipe.__fn_or_cls__
    said = ""
    if task not in (tasks.pretrain, tasks.finetune):
        said = f"configures {task.__module__}:{task.__qualname__}, not a training"
    elif task.__name__ != typed:
        said = f"is a recipe to {task.__name__}; type `fiddlehead {task.__name__} ...`"
    if said:
        raise ConfigError(Problem(factory, message=said))


@contextlib.contextmanager
def _pointing_to_sweep(edits: Sequence[str]) -> Iterator[None]:
    """Adds advice to the problems of an edit that gives several values: --sweep makes a run of each."""
    try:
        yield
    except ConfigError as error:
        from fiddlehead.launch.sweep import values_of

        several = []
        for edit in edits:
            with contextlib.suppress(ConfigError):  # the edit is not well formed, which is the problem
                if len(values_of(edit)) > 1:
                    several.append(edit)
        raise ConfigError(*(_with_advice(problem, several) for problem in error.problems)) from error


def _with_advice(problem: Problem, several: Sequence[str]) -> Problem:
    """The problem, with the advice if it is about one of the edits in `several`."""
    for edit in several:
        path, _, text = edit.partition("=")
        if problem.path in (edit, path) or repr(text) in problem.message:
            said = f"{problem.message}; for a run with each value add --sweep"
            return Problem(problem.path, problem.given, said, problem.allowed)
    return problem
