"""What a run has recorded: recipe, code, data, machine and metrics. It is data: nothing that it names is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import read_json, read_object, reason
from fiddlehead.files.paths import user_path
from fiddlehead.recipe.plain import flat, plain_recipe
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.history import History
from fiddlehead.run.names import find_run

IDENTITY = ("log.name", "log.dir")
"""Values of a recipe that any two runs differ in."""


@dataclass(frozen=True)
class Record:
    """A run as it was recorded, in its directory or in a folder of W&B."""

    name: str
    path: Path
    history: History
    recipe: dict[str, Any]
    """The values of the recipe by path; of a configuration, its class or function."""
    environment: dict[str, Any] = field(default_factory=dict)
    """`environment.json`: git, packages, hardware."""
    shipped: dict[str, Any] = field(default_factory=dict)
    """`code.json`: the code that was shipped with the run; empty if it imported the working tree."""
    data: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each data file, from the newest checkpoint."""
    problems: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def code(self) -> Path | None:
        """The copy of the working tree that the run imported, if it is here."""
        copy = self.path / "code"
        return copy if copy.is_dir() else None

    @property
    def machine(self) -> dict[str, Any]:
        """The hardware and versions of the machine that launched the run, without packages and git."""
        return {name: value for name, value in self.environment.items() if name not in ("git", "packages")}


def open_record(name: str, directory: str | Path = "runs") -> Record:
    """The record of a run: its name in `directory`, its folder, or a folder that W&B has written offline.

    Files that are damaged are left out, and `problems` says so.

    Raises:
        ConfigError: there is no such run.
    """
    folder = user_path(name)
    if folder.suffix == ".wandb" or (folder.is_dir() and list(folder.glob("run-*.wandb"))):
        from fiddlehead.runs.wandb_folder import read_wandb

        return read_wandb(folder)
    return read_run(find_run(name, directory))


def read_run(run: RunDirectory) -> Record:
    """The record in a run directory."""
    problems: list[str] = []
    history = History([], {})
    try:
        history = run.history()
    except ConfigError as error:
        problems += error.problems
    problems += [Problem.in_file(run.metrics, spoiled) for spoiled in history.spoiled[:3]]
    return Record(
        run.name,
        run.path,
        history,
        recipe_values(run.recipe, problems),
        _object(run.environment, problems),
        _object(run.path / "code.json", problems),
        _data(run, problems),
        problems,
    )


def recipe_values(file: Path, problems: list[str]) -> dict[str, Any]:
    """The values of a saved recipe by path; empty if it is damaged, which is added to `problems`."""
    try:
        return flat(plain_recipe(file))
    except ConfigError as error:
        problems += [each if str(file) in each else Problem.in_file(file, each) for each in error.problems]
        return {}


def _object(file: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object in a file; empty if there is none, or a damaged one."""
    if not file.exists():
        return {}
    try:
        return read_object(file)
    except ConfigError as error:
        problems += error.problems
        return {}


def _data(run: RunDirectory, problems: list[str]) -> dict[str, str]:
    """The checksums in the newest checkpoint; empty before the first."""
    states = sorted(run.checkpoints.glob("step-*/state.json"))
    if not states:
        return {}
    try:
        parts = read_json(states[-1])["data"]
        return {f"{part}: {name}": str(sha256) for part, files in parts.items() for name, sha256 in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(Problem.in_file(states[-1], f"does not say the data's checksums: {reason(error)}"))
        return {}
