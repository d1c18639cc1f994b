"""`fiddlehead runs sync`: sends what was recorded offline to W&B."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from fiddlehead.cli.runs import DirOption
from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run, list_runs


def sync(
    names: list[str] = typer.Argument(None, metavar="[RUN]...", help="Runs; by default all with offline records."),
    directory: str = DirOption,
) -> None:
    """Send the offline records of runs to W&B. All attempts of a run become one W&B run.

    Example:  fiddlehead runs sync demo
    """
    from fiddlehead.launch import watch
    from fiddlehead.training.loggers import has_wandb_key

    found = [find_run(name, directory) for name in names] if names else list_runs(directory)
    offline = {run: folders for run in found if (folders := _unsent(run))}
    if not offline:
        print("nothing was recorded offline that has not been sent")  # noqa: T201
        return
    if not has_wandb_key():
        raise ConfigError("W&B has no API key here: `wandb login`, or set WANDB_API_KEY")
    failed = []
    for (run, folders), status in zip(offline.items(), watch.states(list(offline)), strict=True):
        if status is not None and not status.state.ended:
            print(f"{run.name}: is going on ({status.state}); to be sent when it has ended")  # noqa: T201
            continue
        print(f"{run.name}: {len(folders)} attempt{'s' * (len(folders) > 1)}", flush=True)  # noqa: T201
        # All attempts at once: only then does W&B append them to one run.
        command = [sys.executable, "-m", "wandb", "sync", "--id", run.wandb_id, *map(str, folders)]
        code = subprocess.run(command, env={**os.environ, "WANDB_MODE": "online"}).returncode
        if code or _unsent(run):  # W&B's exit code is 0 also when it could not send them
            failed.append(run.name)
    if failed:
        print(f"error: not sent: {', '.join(failed)}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)


def _unsent(run: RunDirectory) -> list[Path]:
    """The folders of the attempts that were recorded offline and that W&B has not marked as sent, in order."""
    folders = sorted((run.path / "wandb").glob("offline-run-*"))
    return [folder for folder in folders if not list(folder.glob("*.wandb.synced"))]
