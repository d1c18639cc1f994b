"""What a command says when the run that it has followed is over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fiddlehead.numbers import duration
from fiddlehead.run.directory import RunDirectory, last_lines
from fiddlehead.run.status import State, Status

if TYPE_CHECKING:
    from fiddlehead.launch import RunFailedError


def say_failure(failure: RunFailedError) -> None:
    """Prints why a run that was followed has failed, and its ending.

    On a terminal it does not repeat what the log, which was shown there, says at its end.
    """
    reason = failure.status.reason
    if not sys.stderr.isatty() or not reason or reason not in "\n".join(last_lines(failure.run.log, 20)):
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
    say_ending(failure.run, failure.status)


def say_ending(run: RunDirectory, status: Status | None) -> None:
    """Prints where a run is, how long its attempt took, and what to type next."""
    took = f" in {duration(status.ended - status.started)}" if status is not None and status.ended else ""
    state = "ended" if status is None else status.state.lower()
    print(f"{run.name} {state}{took}; it is in {_short(run.path)}")  # noqa: T201
    at = "" if run.path.parent == Path("runs").absolute() else f" --dir {_short(run.path.parent)}"
    if status is None or status.state is State.SUCCEEDED:
        place = run.name if not at else _short(run.path)
        print(f"next:  fiddlehead generate {place} --prompt TEXT")  # noqa: T201
        print(f"       fiddlehead runs show {run.name}{at}")  # noqa: T201
    else:
        print(f"next:  fiddlehead runs show {run.name}{at}     why, and the end of its log")  # noqa: T201
        what = "go on from its newest checkpoint" if any(run.checkpoints.glob("step-*")) else "start it again"
        print(f"       fiddlehead runs rerun {run.name}{at}    {what}")  # noqa: T201


def _short(path: Path) -> str:
    """The path below the working directory; elsewhere as it is."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
