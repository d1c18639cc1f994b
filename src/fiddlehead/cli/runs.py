"""`fiddlehead runs` and `fiddlehead generate`: what became of runs, and what their models write."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fiddlehead.cli.common import add_row, table
from fiddlehead.cli.common import show as show_things
from fiddlehead.errors import ConfigError
from fiddlehead.runs import RunDirectory, State, find_run, list_runs

if TYPE_CHECKING:
    from rich.text import Text

app = typer.Typer(invoke_without_command=True, help="List runs, and look into, cancel or repeat one.")

COLOURS = {
    State.RUNNING: "cyan",
    State.SUBMITTED: "cyan",
    State.SUCCEEDED: "green",
    State.CANCELLED: "yellow",
    State.FAILED: "red",
    State.DIED: "red",
}


def complete_run(incomplete: str) -> list[str]:
    """Names of runs, for shell completion."""
    return [run.name for run in list_runs() if run.name.startswith(incomplete)]


DirOption = typer.Option("runs", "--dir", metavar="DIR", help="Where runs are kept (log.dir).")
RunArgument = typer.Argument(metavar="RUN", help="A run's name or directory.", autocompletion=complete_run)


@app.callback()
def runs(context: typer.Context, directory: str = DirOption) -> None:
    """List runs, and look into, cancel or repeat one."""
    if context.invoked_subcommand is not None:
        if directory != "runs":
            raise ConfigError(f"--dir {directory}: goes after {context.invoked_subcommand}, to which it belongs")
        return
    made = table("name", "state", "step", "loss", "tokens/s", "elapsed", "attempt", "where")
    for run in list_runs(directory):
        add_row(made, *_row(run))
    if not made.row_count:
        print(f"no runs in {directory}/")  # noqa: T201
        return
    show_things(made)


@app.command("show")
def show(run: str = RunArgument, directory: str = DirOption) -> None:
    """Show a run: its state and why, its newest metrics, its files."""
    found = find_run(run, directory)
    status = found.status()
    made = table("run", found.name)
    if status is not None:
        add_row(made, "state", _coloured(status.state))
        add_row(made, "reason", status.reason)
        add_row(made, "exit code", str(status.exit_code if status.exit_code is not None else ""))
        add_row(made, "attempt", str(status.attempt))
        add_row(made, "where", f"{status.executor} on {status.host}, process {status.pid}")
        add_row(made, "elapsed", _elapsed(status.started, status.ended))
    for name, value in found.last_metrics().items():
        add_row(made, name, f"{float(value):.6g}")
    add_row(made, "checkpoints", ", ".join(path.name for path in sorted(found.checkpoints.glob("step-*"))))
    add_row(made, "directory", str(found.path))
    add_row(made, "command", found.command.read_text().strip() if found.command.exists() else "")
    show_things(made)
    if status is not None and status.state in (State.FAILED, State.DIED) and found.log.exists():
        print("the last lines of its log:")  # noqa: T201
        print("\n".join(found.log.read_text(errors="replace").splitlines()[-10:]))  # noqa: T201


@app.command("logs")
def logs(
    run: str = RunArgument,
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on until the run ends."),
    directory: str = DirOption,
) -> None:
    """Print a run's log."""
    found = find_run(run, directory)
    if not found.log.exists() and not follow:
        print(f"{found.path} has no log yet", file=sys.stderr)  # noqa: T201
        return
    while not found.log.exists():
        status = found.status()
        if status is None or status.state.ended:
            return
        time.sleep(0.2)
    with found.log.open(errors="replace") as stream:
        while True:
            status = found.status()  # asked before reading, so that the last lines are not missed
            text = stream.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if not follow or ((status is None or status.state.ended) and not text):
                return
            time.sleep(0.2)


@app.command("cancel")
def cancel(run: str = RunArgument, directory: str = DirOption) -> None:
    """Stop a run: it saves its last step and ends."""
    import socket

    from fiddlehead.launch import local

    found = find_run(run, directory)
    status = found.status()
    if status is None or status.state.ended:
        raise ConfigError(f"run {found.name!r} is not running: {status.state if status else 'never started'}")
    if status.host != socket.gethostname():
        raise ConfigError(f"run {found.name!r} runs on {status.host}: cancel it there")
    print(f"cancelling {found.name}: the last step is being saved")  # noqa: T201
    if not local.cancel(status):
        print("it did not end by itself and was killed; its earlier checkpoints are whole")  # noqa: T201
    status = found.status()
    print(f"{found.name}: {status.state if status else ''} {status.reason if status else ''}")  # noqa: T201


@app.command("rerun")
def rerun(
    run: str = RunArgument,
    detach: bool = typer.Option(False, "--detach", help="Return as soon as the job has started."),
    allow: list[str] = typer.Option(None, "--allow", metavar="MODULE", help="A module of yours that it may import."),
    directory: str = DirOption,
) -> None:
    """Start a run again from its saved recipe: it continues from its newest checkpoint."""
    from fiddlehead import launch
    from fiddlehead.launch.local import local
    from fiddlehead.recipe import Recipe

    found = find_run(run, directory)
    recipe = Recipe.load(found.recipe, allow=tuple(allow or ()))
    recipe.log.dir, recipe.log.name = str(found.path.parent), found.name
    status = found.written_status()
    executor = None if status is not None and status.executor == "direct" else local()
    try:
        launch.launch(recipe, executor, detach=detach, allow=allow or (), command=f"fiddlehead runs rerun {run}")
    except launch.RunFailedError as failure:
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(failure.status.exit_code or 1) from None


def generate(
    run: str = RunArgument,
    prompt: str = typer.Option(..., "--prompt", "-p", help="The text to go on from."),
    max_new_tokens: int = typer.Option(200, min=1, help="How many tokens to write."),
    temperature: float = typer.Option(0.8, min=0.0, help="0 always takes the likeliest token."),
    top_k: int = typer.Option(50, min=0, help="Choose among the k likeliest tokens; 0: all."),
    seed: int = typer.Option(0, help="The same seed writes the same text."),
    checkpoint: Path = typer.Option(None, "--checkpoint", help="A checkpoint other than the run's newest."),
    directory: str = DirOption,
) -> None:
    """Let a run's model go on from a prompt.

    Example:  fiddlehead generate demo --prompt "def "
    """
    from fiddlehead.tasks import generate

    found = find_run(run, directory)
    for piece in generate(found, prompt, max_new_tokens, temperature, top_k, seed, checkpoint):
        print(piece, end="", flush=True)  # noqa: T201
    print()  # noqa: T201


def _row(run: RunDirectory) -> list[Any]:
    metrics = run.last_metrics()
    rate = metrics.get("tokens_per_s")
    row = [
        metrics.get("step", ""),
        f"{float(metrics['loss']):.4f}" if "loss" in metrics else "",
        f"{float(rate):,.0f}" if rate else "",
    ]
    try:
        status = run.status()
    except ConfigError as error:
        return [run.name, str(error), *row, "", "", ""]
    if status is None:
        return [run.name, "", *row, "", "", ""]
    where = f"{status.executor} on {status.host}"
    return [run.name, _coloured(status.state), *row, _elapsed(status.started, status.ended), str(status.attempt), where]


def _coloured(state: State) -> Text:
    from rich.text import Text

    return Text(str(state), style=COLOURS[state])


def _elapsed(start: float, end: float | None) -> str:
    return str(timedelta(seconds=round((end or time.time()) - start)))
