"""Names of runs: finding a run, listing all, and new names."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path

from fiddlehead.errors import ConfigError, Problem, nearest
from fiddlehead.files.paths import user_path
from fiddlehead.run.directory import PRIVATE, RunDirectory

_SHOWN = 12  # runs that an error lists, the newest first, if none has a name like the given one


def find_run(name: str, directory: str | Path = "runs") -> RunDirectory:
    """The run called `name` in `directory`, or in the folder with the path `name`.

    Raises:
        ConfigError: there is no such run.
    """
    for path in (user_path(directory) / name, user_path(name)):
        if (path / "recipe.yaml").is_file():
            return RunDirectory(path.resolve())
    names = [run.name for run in list_runs(directory)]
    if len(names) > _SHOWN and nearest(name, names) is None:
        names = [*names[: -_SHOWN - 1 : -1], f"and {len(names) - _SHOWN} older ones"]
    raise ConfigError(Problem("", name, f"unknown run {name!r} in {directory}/", names))


def list_runs(directory: str | Path = "runs") -> list[RunDirectory]:
    """Every run in `directory`, the oldest first."""
    folders = user_path(directory).glob("*/recipe.yaml")
    return [RunDirectory(file.parent.resolve()) for file in sorted(folders, key=lambda file: file.stat().st_mtime)]


def reserve_name(recipe: str, directory: str | Path = "runs") -> str:
    """Makes the folder of a new run and returns its name: the recipe's, the date and the time."""
    name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):  # another run began in the same second
            (user_path(directory) / (name + suffix)).mkdir(PRIVATE, parents=True)
            return name + suffix
    raise ConfigError(Problem("log.name", None, f"a thousand runs called {name} began in one second; give a name"))
