"""What a command says when the run that it has followed is over."""

from __future__ import annotations

from pathlib import Path

from fiddlehead.numbers import duration
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status


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
        print(f"       fiddlehead runs rerun {run.name}{at}    go on from its newest checkpoint")  # noqa: T201


def _short(path: Path) -> str:
    """The path below the working directory; elsewhere as it is."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
