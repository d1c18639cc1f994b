"""`fiddlehead pretrain` and `finetune`: start a run, or many, from a recipe and edits."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fiddlehead.cli.common import (
    AllowOption,
    DespiteOption,
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
from fiddlehead.cli.completion import complete_run
from fiddlehead.cli.ending import say_ending
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.numbers import scientific, short

if TYPE_CHECKING:
    from fiddlehead.launch import Plan
    from fiddlehead.launch.executor import Executor
    from fiddlehead.launch.sweep import Sweep
    from fiddlehead.plan.cards import Card
    from fiddlehead.plan.layouts import Layout
    from fiddlehead.recipe import Recipe
    from fiddlehead.run.directory import RunDirectory
    from fiddlehead.run.status import Status


FINETUNE_HELP = """Train a model that can write on examples of what to answer.

Recipes: [bold]full[/bold], [bold]lora[/bold] and [bold]dora[/bold] learn from messages, or prompts with completions;
[bold]dpo[/bold] from pairs of answers; each for any model. A model's name, such as [bold]llama3_8b[/bold], is the \
recipe that fine-tunes it. What to begin with and what to learn are edits; the options are pretrain's.

Example:  fiddlehead finetune lora model.init_from=llama data.paths=answers.jsonl log.name=tuned

Example:  fiddlehead finetune "llama3_8b(peft_scheme='dora')" model.init_from=llama data.paths=answers.jsonl
"""


def pretrain(
    context: typer.Context,
    words: list[str] = WordsArgument,
    factory: str = FactoryOption,
    dryrun: bool = typer.Option(False, "--dryrun", help="Check everything and show the plan; start nothing."),
    gpu: str = typer.Option(
        None, "--gpu", metavar="NAME", help="Plan for this GPU, such as h100; to start, where the GPU is not known."
    ),
    fit: bool = typer.Option(
        False, "--fit", help="Take the fastest layout that fits the GPUs; the global batch stays. It says what changes."
    ),
    direct: bool = typer.Option(False, "--direct", help="Run in this process, without an executor."),
    detach: bool = typer.Option(False, "--detach", help="Return as soon as the job is submitted."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask before starting."),
    to_yaml: Path = typer.Option(
        None, "--to-yaml", metavar="FILE", parser=user_path, help="Write the resolved recipe; start nothing."
    ),
    after: list[str] = typer.Option(
        None, "--after", metavar="RUN", help="Start when this run has succeeded.", autocompletion=complete_run
    ),
    sweep: bool = typer.Option(False, "--sweep", help="A run for every combination of values: optim.lr=1e-3,3e-4"),
    zipped: bool = typer.Option(False, "--zip", help="With --sweep: pair the values instead."),
    max_running: int = typer.Option(None, "--max-running", min=1, help="With --sweep: the most runs at a time."),
    metric: str = typer.Option(
        "", "--metric", metavar="NAME", help="With --sweep: sort by this; by default val_loss or loss."
    ),
    allow: list[str] = AllowOption,
    despite: list[str] = DespiteOption,
) -> None:
    """Train a language model from scratch, or continue an interrupted run.

    [bold]Edits[/bold] change the recipe, in the order given; a value is read as the type of its field:

      trainer.max_steps=50   model.config.num_query_groups=1   optim.lr*=0.5

      data=@data.yaml   log.name=first

    [bold]executor=NAME[/bold] selects where it runs, executor.KEY=VALUE sets how:

      executor=local executor.ntasks_per_node=2   executor=slurm executor.nodes=2

      executor=docker executor.image=IMAGE

    With the log.name of an earlier run, the command continues that run from its newest checkpoint.

    Example:  fiddlehead pretrain tiny trainer.max_steps=50 log.name=first

    Example:  fiddlehead pretrain tiny_test optim.lr=1e-3,4e-3 model.config.num_query_groups=1,2 --sweep
    """
    if direct and (detach or after or sweep):
        other = "--detach" if detach else "--after" if after else "--sweep"
        raise ConfigError(f"--direct and {other} exclude each other: one stays in this process, the other leaves it")
    for option, given in (("--zip", zipped), ("--max-running", max_running), ("--metric", metric)):
        if given and not sweep:
            raise ConfigError(f"{option} goes with --sweep")
    command = context.info_name or "pretrain"
    factory, edits = named_recipe(factory, words or (), command)
    edits, executor_edits = split_executor(edits)
    if gpu and sweep:
        raise ConfigError("--gpu and --sweep exclude each other: --gpu plans one run")
    if direct and executor_edits:
        raise ConfigError(f"--direct runs without an executor; leave out {' '.join(executor_edits)}")
    executor, executor_name = configure_executor(executor_edits)
    where = f"executor {executor_name}"
    if gpu and not (dryrun or to_yaml) and (direct or not executor.ships_code):
        raise ConfigError("--gpu goes with --dryrun here, as the run trains on the GPUs of this machine")
    if sweep:
        if to_yaml or after or fit:
            other = "--to-yaml" if to_yaml else "--after" if after else "--fit"
            raise ConfigError(f"--sweep and {other} exclude each other")
        _sweep(
            command,
            factory,
            edits,
            executor,
            where,
            zipped,
            max_running,
            metric,
            dryrun,
            detach,
            yes,
            allow or (),
            despite or (),
        )
        return
    from fiddlehead import launch

    with _pointing_to_sweep(edits):
        recipe, name = load_recipe(factory, edits, allow or (), task=command)
        _refuse_other_tasks(recipe, factory, command)
        before = _successes(after or (), recipe.log.dir)
        card = named_card(gpu)
        planned = executor if executor_edits or not (direct or gpu) else None
        changes = []
        if fit:
            layout = launch.search(recipe, planned, target=card)[0]
            recipe, changes = launch.fitted(recipe, layout), fitted_rows(layout)
        plan = launch.plan(recipe, planned, target=card, waits=bool(before))
        plan.refuse_problems()
    if to_yaml is not None:
        recipe.save(to_yaml)
        print(f"wrote {to_yaml}; run it with fiddlehead {command} @{to_yaml}")  # noqa: T201
        for option, edit in changes:
            print(f"{option}: {edit}")  # noqa: T201
        for reason in plan.missing:
            print(f"it cannot start yet: {reason}", file=sys.stderr)  # noqa: T201
        return
    if not dryrun:
        plan.refuse_start(despite or ())
    where_shown = "in this process" if direct else f"on {gpu}" if gpu and planned is None else where
    show_plan(name, where_shown, [*plan.rows(name=name), *changes])
    if dryrun:
        if shipped := plan.dry_run():
            print(shipped.replace("shipped", "would ship"))  # noqa: T201
        plan.refuse_unfit(despite or ())
        return
    if not yes and sys.stdin.isatty() and not typer.confirm("Start?", default=True):
        raise typer.Exit(0)
    queued = [run for run in before if _in_queue_of(run, executor)]
    here = [run for run in before if run not in queued]
    if here and detach:
        names = ", ".join(run.name for run in here)
        said = f"{where} cannot wait for {names}, so this command has to stay and do it"
        raise ConfigError(Problem("--after --detach", message=said))
    _wait_for(here)
    try:
        run = plan.submit(
            name=name, detach=detach, allow=allow or (), despite=despite or (), command=_typed(), after=queued
        )
    except launch.RunFailedError as failure:
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
        say_ending(failure.run, failure.status)
        raise typer.Exit(failure.status.exit_code or 1) from None
    if not detach:
        say_ending(run, run.status())
    else:
        print(f"started {run.path}; watch it with `fiddlehead runs logs {run.name} -f`")  # noqa: T201


def _sweep(
    task: str,
    factory: str,
    edits: Sequence[str],
    executor: Executor,
    where: str,
    zipped: bool,
    max_running: int | None,
    metric: str,
    dryrun: bool,
    detach: bool,
    yes: bool,
    allow: Sequence[str],
    despite: Sequence[str],
) -> None:
    """Checks every run of a sweep, shows their total cost, and runs them."""
    from fiddlehead import launch
    from fiddlehead.launch import sweep as sweeps

    if detach and not executor.queues:
        said = f"{where} queues nothing, so this command has to stay and start the runs"
        raise ConfigError(Problem("--sweep --detach", message=said))
    expanded = sweeps.expand(edits, "", zipped=zipped)
    first, title = load_recipe(factory, expanded[0].edits(edits), allow, task=task)
    _refuse_other_tasks(first, factory, task)
    name = first.log.name or f"{title}-{datetime.now():%Y%m%d-%H%M%S}"
    variants = sweeps.expand(edits, name, zipped=zipped)
    plans: list[Plan] = []
    problems: list[str] = []
    for variant in variants:
        try:
            recipe, _ = load_recipe(factory, variant.edits(edits), allow, task=task)
            recipe.log.name = variant.name
            plans.append(launch.plan(recipe, executor))
            plans[-1].refuse_problems()
            if not dryrun:
                plans[-1].refuse_unfit(despite)
        except ConfigError as error:
            problems += error.of(variant.name).problems
    refuse(problems)
    if not executor.queues and max_running is None:
        max_running = 1
    if not dryrun and (missing := sorted({reason for plan in plans for reason in plan.missing})):
        raise ConfigError(*missing)
    made = table("run", *variants[0].values)
    for variant in variants:
        add_row(made, variant.name, *variant.values.values())
    show(made)
    at_once = "all at once" if max_running is None else f"{max_running} at a time"
    notes = [("changed", sentence) for sentence in plans[0].changed]
    show_plan(f"{len(variants)} runs, {at_once}", where, [*_totals(plans, executor), *notes])
    if dryrun:
        if shipped := plans[0].dry_run():
            print(shipped.replace("shipped", "each would ship"))  # noqa: T201
        for variant, plan in zip(variants, plans, strict=True):
            try:
                plan.refuse_unfit(despite)
            except ConfigError as error:
                problems += error.of(variant.name).problems
        refuse(problems)
        return
    if not yes and sys.stdin.isatty() and not typer.confirm("Start?", default=True):
        raise typer.Exit(0)
    made = sweeps.Sweep(name, str(first.log.dir), variants)
    report = None if detach else _Report(made)
    try:
        statuses = sweeps.run_all(
            made,
            plans,
            executor,
            max_running=max_running,
            allow=allow,
            despite=despite,
            command=_typed(),
            report=report,
        )
    except KeyboardInterrupt:
        print("cancelled; the runs have saved their last steps", file=sys.stderr)  # noqa: T201
        raise typer.Exit(130) from None
    if detach:
        print(f"started {len(variants)} runs; `fiddlehead runs sweep {name}` shows what came out")  # noqa: T201
        return
    from fiddlehead.cli.sweep import show_results

    show_results(made, metric)
    failed = sweeps.failed(made, statuses)
    if failed:
        print(f"error: {len(failed)} of {len(statuses)} runs did not succeed: {', '.join(failed)}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)


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


class _Report:
    """Prints the progress of a sweep: a line for each run that begins or ends."""

    def __init__(self, sweep: Sweep) -> None:
        self.runs = sweep.runs()
        self.said: dict[str, str] = {}

    def __call__(self, statuses: list[Status | None]) -> None:
        for run, status in zip(self.runs, statuses, strict=True):
            if status is not None and self.said.get(run.name) != status.state:
                self.said[run.name] = status.state
                done = sum(1 for other in statuses if other is not None and other.state.ended)
                reason = f": {status.reason}" if status.reason else ""
                print(f"[{done}/{len(self.runs)} ended] {run.name} {status.state}{reason}", flush=True)  # noqa: T201


def _totals(plans: Sequence[Plan], executor: Executor) -> list[tuple[str, str]]:
    """The tokens, FLOPs and GPU hours of all runs of a sweep."""
    trainings = [plan.training for plan in plans]
    tokens, flops = sum(each.tokens for each in trainings), sum(each.flops for each in trainings)
    rows = [("together", f"{short(tokens)} tokens, {scientific(flops)} FLOPs")]
    if any(plan.recipe.trainer.accelerator in ("gpu", "cuda") for plan in plans):
        hours = flops / (0.4 * 989e12) / 3600
        rows.append(("GPU hours", f"about {hours:,.1f} on H100s at 40 % MFU"))
        if executor.time_limit:
            most = sum(each.world_size for each in trainings) * executor.time_limit / 3600
            rows.append(("", f"at most {most:,.1f} for an attempt of each, by executor.time"))
    return rows


def _successes(names: Sequence[str], directory: str) -> list[RunDirectory]:
    """The runs to wait for, without those that have succeeded already.

    Raises:
        ConfigError: one has ended otherwise.
    """
    from fiddlehead.launch import watch
    from fiddlehead.run.names import find_run
    from fiddlehead.run.status import State

    waiting = []
    for run in [find_run(name, directory) for name in names]:
        (status,) = watch.states([run])
        if status is None or (status.state.ended and status.state is not State.SUCCEEDED):
            said = f"it is {status.state if status else 'no run that began'}"
            raise ConfigError(Problem(f"--after {run.name}", message=said))
        if not status.state.ended:
            waiting.append(run)
    return waiting


def _in_queue_of(run: RunDirectory, executor: Executor) -> bool:
    """Whether the run is in the queue of `executor`, which can then wait for it."""
    from fiddlehead.launch import watch

    theirs = watch.load_executor(run)
    return executor.queues and theirs is not None and theirs.queue() == executor.queue()


def _wait_for(runs: Sequence[RunDirectory]) -> None:
    """Waits until all have succeeded.

    Raises:
        ConfigError: one has not.
    """
    from fiddlehead.launch import watch
    from fiddlehead.run.status import State

    for run in runs:
        print(f"waiting for {run.name}", flush=True)  # noqa: T201
        status = watch.wait(run)
        if status is None or status.state is not State.SUCCEEDED:
            said = f"it ended {status.state if status else ''}, so this run never began"
            raise ConfigError(Problem(f"--after {run.name}", message=said))


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


def _typed() -> str:
    """The command line without the values of environment variables, which may be secrets."""
    words = [re.sub(r"(env_vars\b[^=]*=).*", r"\1***", word, flags=re.DOTALL) for word in sys.argv[1:]]
    return shlex.join(["fiddlehead", *words])


def show_plan(name: str, where: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints a plan's table."""
    made = table(name, where)
    for row in rows:
        add_row(made, *row)
    show(made)
