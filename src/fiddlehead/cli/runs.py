"""`fiddlehead runs`: lists, shows, stops and continues runs."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer

from fiddlehead.cli.common import AllowOption, DespiteOption, add_row, phases_table, table
from fiddlehead.cli.common import show as show_things
from fiddlehead.cli.completion import complete_run
from fiddlehead.cli.ending import say_ending, say_failure
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.numbers import figure
from fiddlehead.run import damage
from fiddlehead.run.directory import RunDirectory, last_lines
from fiddlehead.run.names import find_run, list_runs
from fiddlehead.run.prediction import Prediction, difference
from fiddlehead.run.status import State, Status

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

app = typer.Typer(invoke_without_command=True, help="List runs, and look into, cancel or repeat one.")

COLOURS = {
    State.PENDING: "cyan",
    State.RUNNING: "cyan",
    State.INTERRUPTED: "cyan",
    State.SUCCEEDED: "green",
    State.CANCELLED: "yellow",
    State.FAILED: "red",
    State.DIED: "red",
    State.DAMAGED: "red",
}


DirOption = typer.Option("runs", "--dir", metavar="DIR", help="Where runs are kept (log.dir).")
RunArgument = typer.Argument(metavar="RUN", help="A run's name or directory.", autocompletion=complete_run)
RunsArgument = typer.Argument(metavar="RUN...", help="Names or directories of runs.", autocompletion=complete_run)


@app.callback()
def runs(
    context: typer.Context,
    directory: str = DirOption,
    as_json: bool = typer.Option(False, "--json", help="Print everything that is known, as JSON."),
) -> None:
    """List runs, and look into, cancel or repeat one."""
    from fiddlehead.launch import watch

    if context.invoked_subcommand is not None:
        if directory != "runs":
            said = f"goes after {context.invoked_subcommand}, to which it belongs"
            raise ConfigError(Problem(f"--dir {directory}", message=said))
        return
    found = list_runs(directory)
    statuses = watch.states(found)
    if as_json:
        print(json.dumps([_facts(run, status) for run, status in zip(found, statuses, strict=True)], indent=1))  # noqa: T201
        return
    columns = ("name", "state", "step", "loss", "tokens/s", "elapsed", "attempt", "where", "")
    made = table(*columns, optional=("where", "attempt"), notes=True)
    for run, status in zip(found, statuses, strict=True):
        add_row(made, *_row(run, status))
    if not made.row_count:
        print(f"no runs in {directory}/")  # noqa: T201
        return
    show_things(made)


@app.command("show")
def show(names: list[str] = RunsArgument, directory: str = DirOption) -> None:
    """Show a run: its state and the reason, its newest metrics, its plan, the time of each phase, its files.

    Of several runs, show what they differ in, and their results.
    """
    from fiddlehead.launch import code, watch

    if len(names) > 1:
        from fiddlehead.cli.compare import open_records, show_differences

        show_differences(open_records(names, directory))
        return
    found = find_run(names[0], directory)
    (status,) = watch.states([found])
    made = table("run", found.name)
    if status is not None:
        add_row(made, "state", _coloured(status.state))
        add_row(made, "reason", status.reason)
        add_row(made, "exit code", str(status.exit_code if status.exit_code is not None else ""))
        add_row(made, "attempt", str(status.attempt))
        add_row(made, "where", watch.where(found, status))
        add_row(made, "elapsed", _elapsed(status.started, status.ended))
    for problem in damage.find(found):
        add_row(made, "damaged", problem)
    metrics = {name: float(value) for name, value in found.last_metrics().items()}
    for name, value in metrics.items():
        if not name.startswith("seconds_"):
            add_row(made, name, figure(value))
    add_row(made, "checkpoints", ", ".join(path.name for path in sorted(found.checkpoints.glob("step-*"))))
    add_row(made, "directory", str(found.path))
    if found.wandb_url:
        add_row(made, "W&B", found.wandb_url)
    add_row(made, "command", found.command.read_text(errors="replace").strip() if found.command.exists() else "")
    shipped = code.shipped(found)
    if shipped is not None:
        add_row(made, "code", shipped.describe())
    show_things(made)
    if (predicted := found.prediction()) is not None and predicted.knows:
        show_things("", _plan_table(predicted, metrics))
    if "seconds_per_step" in metrics:
        show_things("", phases_table(metrics))
    if status is not None and status.state in (State.FAILED, State.DIED):
        for file, what in ((found.log, "its log"), (found.scheduler_log, "what its scheduler printed")):
            if file.exists():
                print(f"the last lines of {what}, {file}:")  # noqa: T201
                print("\n".join(last_lines(file, 10)))  # noqa: T201


@app.command("cancel")
def cancel(
    names: list[str] = RunsArgument,
    force: bool = typer.Option(False, "--force", help="Mark the run as ended, because its machine is gone."),
    directory: str = DirOption,
) -> None:
    """Stop runs: each saves its current step and ends."""
    from fiddlehead.launch import watch

    found = [find_run(name, directory) for name in names]
    if force:
        for run in found:
            status = watch.write_off(run)
            print(f"{run.name}: {status.state if status else ''} {status.reason if status else ''}")  # noqa: T201
        return
    for run, status in zip(found, watch.states(found), strict=True):
        if status is None or status.state.ended:
            why = f": {status.reason}" if status and status.state is State.DAMAGED else ""
            raise ConfigError(f"run {run.name!r} is not running: {status.state if status else 'never started'}{why}")
    for run in found:
        print(f"cancelling {run.name}: the last step is being saved")  # noqa: T201
        watch.ask_to_stop(run)
    for run in found:
        status = watch.cancel(run)
        print(f"{run.name}: {status.state if status else ''} {status.reason if status else ''}")  # noqa: T201


@app.command("rerun")
def rerun(
    run: str = RunArgument,
    detach: bool = typer.Option(False, "--detach", help="Return as soon as the job is submitted."),
    allow: list[str] = AllowOption,
    despite: list[str] = DespiteOption,
    trust_executor: bool = typer.Option(
        False, "--trust-executor", help="Use the run's executor.json although you did not launch the run."
    ),
    directory: str = DirOption,
) -> None:
    """Continue a run from its newest checkpoint, with its saved recipe and executor.

    If the recipe has relative paths, in the folder where the run was launched.
    """
    from fiddlehead import launch
    from fiddlehead.launch import watch
    from fiddlehead.launch.started_in import refuse_elsewhere
    from fiddlehead.recipe import Recipe, trust

    found = find_run(run, directory)
    if not (trust_executor or trust.knows_executor(found) or watch.is_plain(found)):
        said = (
            "you did not launch this run from here, and where a run goes can have commands in it; read that file, then "
            "add --trust-executor, or start the recipe anew: "
            f"fiddlehead pretrain @{found.recipe} log.name=NAME executor=..."
        )
        raise ConfigError(Problem.in_file(found.executor, said))
    recipe = Recipe.load(found.recipe, allow=tuple(allow or ()))
    refuse_elsewhere(found, recipe)
    recipe.log.dir, recipe.log.name = str(found.path.parent), found.name
    executor = watch.load_executor(found)
    try:
        command = shlex.join(["fiddlehead", "runs", "rerun", run])
        before = found.prediction()
        despite = sorted({*(despite or ()), *(before.despite if before else ())})  # it was said of this run before
        launch.launch(recipe, executor, detach=detach, allow=allow or (), despite=despite, command=command)
    except launch.RunFailedError as failure:
        say_failure(failure)
        raise typer.Exit(failure.status.exit_code or 1) from None
    if not detach:
        say_ending(found, found.status())
    else:
        print(f"started {found.path}; watch it with `fiddlehead runs logs {found.name} -f`")  # noqa: T201


def _plan_table(predicted: Prediction, metrics: Mapping[str, float]) -> Table:
    """Plan against measurement, as far as the run has come; "" is not measured yet."""
    step = int(metrics.get("step", 0))
    left = None
    if "seconds_per_step" in metrics:
        left = metrics["seconds_per_step"] * (predicted.max_steps - step) / 3600
    made = table(f"plan for {predicted.gpus} x {predicted.gpu or 'GPUs'}", "planned", "measured", "difference")
    for name, planned, measured, shown in (
        ("memory", predicted.memory_gib, metrics.get("memory_gib"), "{:,.2f} GiB"),
        ("tokens/s", predicted.tokens_per_s, metrics.get("tokens_per_s"), "{:,.0f}"),
        ("hours left", predicted.hours_left(step), left, "{:,.2f}"),
    ):
        if planned is None:
            continue
        known = "" if measured is None else shown.format(measured)
        differs = "" if measured is None or not planned else difference(planned, measured)
        add_row(made, name, shown.format(planned), known, differs)
    return made


def _row(run: RunDirectory, status: Status | None) -> list[Any]:
    from rich.text import Text

    from fiddlehead.launch import watch

    metrics, damaged = run.last_metrics(), damage.find(run)
    rate = metrics.get("tokens_per_s")
    row = [
        metrics.get("step", ""),
        f"{float(metrics['loss']):.4f}" if "loss" in metrics else "",
        f"{float(rate):,.0f}" if rate else "",
    ]
    if damaged:  # whole: what to do is at its end
        shown = "" if status is None else _coloured(status.state)
        return [
            run.name,
            shown,
            *row,
            "",
            "",
            "",
            Text("\n".join(damaged).replace(f"{run.path}/", ""), style=COLOURS[State.DAMAGED]),
        ]
    if status is None:
        return [run.name, "", *row, "", "", "", ""]
    reason = status.reason.split("\n")[0]
    return [
        run.name,
        _coloured(status.state),
        *row,
        _elapsed(status.started, status.ended),
        str(status.attempt),
        watch.where(run, status),
        reason if len(reason) <= 100 else reason[:99] + "…",
    ]


def _facts(run: RunDirectory, status: Status | None) -> dict[str, Any]:
    """A run as JSON values: metrics are numbers, and null is one that is not finite."""
    from fiddlehead.runs.export import json_value
    from fiddlehead.runs.record import recipe_values

    said = {} if status is None else asdict(status)
    predicted = run.prediction()
    known = {
        "plan": None if predicted is None else asdict(predicted),
        "job": run.job_id,
        "metrics": json_value({name: float(value) for name, value in run.last_metrics().items()}),
        "directory": str(run.path),
        "damaged": damage.find(run),
        "recipe": json_value(recipe_values(run.recipe, [])),
    }
    return {"name": run.name, **said, **known}


def _coloured(state: State) -> Text:
    from rich.text import Text

    return Text(str(state), style=COLOURS[state])


def _elapsed(start: float, end: float | None) -> str:
    return str(timedelta(seconds=round((end or time.time()) - start)))
