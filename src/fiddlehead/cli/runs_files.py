"""`fiddlehead runs logs` and `clean`: what runs have printed, and deleting them."""

from __future__ import annotations

import re
import shutil
import sys
import time

import typer

from fiddlehead.cli.common import add_row, table
from fiddlehead.cli.common import show as show_things
from fiddlehead.cli.runs import DirOption, RunArgument
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.run.alive import is_here, way_out
from fiddlehead.run.directory import RunDirectory, last_lines
from fiddlehead.run.names import find_run, list_runs
from fiddlehead.run.status import State, Status

UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def logs(
    run: str = RunArgument,
    follow: bool = typer.Option(False, "--follow", "-f", help="Follow the log until the run ends."),
    rank: str = typer.Option("0", "--rank", metavar="N|all", help="The log of which rank."),
    attempt: str = typer.Option("", "--attempt", metavar="N|all", help="Which attempt; by default the newest."),
    directory: str = DirOption,
) -> None:
    """Print the newest attempt of a run's log.

    Example:  fiddlehead runs logs demo -f --rank all
    """
    from fiddlehead.launch import watch
    from fiddlehead.launch.logs import log_files, print_attempt

    found = find_run(run, directory)
    if rank != "all" and not rank.isdigit():
        raise ConfigError(Problem(f"--rank {rank}", message="must be a number or all"))
    if attempt not in ("", "all") and not attempt.isdigit():
        raise ConfigError(Problem(f"--attempt {attempt}", message="must be a number or all"))
    if follow:
        if attempt:
            raise ConfigError(Problem("--attempt", message="an attempt that is over cannot be followed; leave out -f"))
        watch.print_logs(found, rank)
        return
    files = log_files(found, rank)
    if print_attempt(found, files, attempt):
        return
    if found.scheduler_log.exists():
        print(f"the job has printed nothing yet; the end of {found.scheduler_log}:")  # noqa: T201
        print("\n".join(last_lines(found.scheduler_log, 20)))  # noqa: T201
    else:
        print(f"{found.path} has no log yet", file=sys.stderr)  # noqa: T201


def clean(
    names: list[str] = typer.Argument(None, metavar="[RUN]...", help="Runs; by default all that the options select."),
    older_than: str = typer.Option("", "--older-than", metavar="AGE", help="Ended this long ago: 12h, 7d, 2w."),
    state: str = typer.Option(
        "", "--state", metavar="STATE", help="In this state: FAILED, CANCELLED, DIED, SUCCEEDED, DAMAGED."
    ),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask."),
    directory: str = DirOption,
) -> None:
    """Delete runs that have ended, with their checkpoints.

    Example:  fiddlehead runs clean --state FAILED --older-than 7d
    """
    from fiddlehead.launch import secrets, watch
    from fiddlehead.recipe import trust

    if not (names or older_than or state):
        raise ConfigError("nothing says which runs: give names, --older-than or --state")
    age = re.fullmatch(r"(\d+)([mhdw])", older_than)
    if older_than and not age:
        said = "must be a number and a unit: 30m, 12h, 7d or 2w"
        raise ConfigError(Problem(f"--older-than {older_than}", message=said))
    ended = [kind for kind in State if kind.ended]
    if state and state not in ended:
        raise ConfigError(Problem.unknown("--state", state, "state", ended))
    before = time.time() - int(age[1]) * UNITS[age[2]] if age else float("inf")
    found = [find_run(name, directory) for name in names] if names else list_runs(directory)
    chosen = []
    for run, status in zip(found, watch.states(found), strict=True):
        if status is not None and not status.state.ended:
            if names:
                gone = "" if is_here(status) else f", or, {way_out(run.name)}"
                raise ConfigError(f"run {run.name!r} is going on ({status.state}); cancel it first{gone}")
        elif (not state or (status is not None and status.state == state)) and (_last_sign(run, status) < before):
            chosen.append((run, status))
    if not chosen:
        print("no such runs")  # noqa: T201
        return
    made = table("name", "state", "step", "size")
    for run, status in chosen:
        size = sum(file.lstat().st_size for file in run.path.rglob("*") if not file.is_dir())
        add_row(made, run.name, status.state if status else "", str(run.last_step()), f"{size / 1e6:,.1f} MB")
    show_things(made)
    if not yes and not typer.confirm(f"Delete {'this' if len(chosen) == 1 else 'these'} for good?", default=False):
        raise typer.Exit(0)
    for run, _ in chosen:
        secrets.remove(run)
        trust.forget(run)
        shutil.rmtree(run.path)


def _last_sign(run: RunDirectory, status: Status | None) -> float:
    """When a run ended or last wrote something, in seconds since the epoch."""
    if status is not None and status.ended:
        return status.ended
    return max(file.stat().st_mtime for file in (run.recipe, run.command, run.log, run.metrics) if file.exists())
