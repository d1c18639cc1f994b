"""Records launches: the user's own names that the recipe of a launched run may use when it is read again.

A run's folder may come from someone else, so it cannot itself say what is trusted. A launch therefore writes a note
outside the folder. The note counts only for the launched files, in the same place, with code from the same places.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.paths import user_path
from fiddlehead.recipe import project
from fiddlehead.run.directory import RunDirectory


def remember(run: RunDirectory, names: Iterable[str]) -> None:
    """Records that this user has launched `run` with its present files; its recipe uses `names`."""
    names = sorted(names)
    packages = {name.partition(":")[0].partition(".")[0] for name in names}
    note = {
        "run": str(run.path.resolve()),
        "recipe": _digest(run.recipe),
        "executor": _digest(run.executor),
        "names": names,
        "places": {package: project.places(package) for package in sorted(packages)},
    }
    with contextlib.suppress(OSError, ConfigError):  # if it cannot be written, the run will need --allow
        file = _file(run)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(file, json.dumps(note, indent=1) + "\n", mode=0o600)


def forget(run: RunDirectory) -> None:
    """Removes the record of a run."""
    with contextlib.suppress(OSError, ConfigError):
        _file(run).unlink(missing_ok=True)


def names(file: Path, text: str) -> tuple[str, ...]:
    """The names that the recipe in `file` may use, because this user has launched this `text` with the same code."""
    note = _note(RunDirectory(file.resolve().parent))
    if file.name != "recipe.yaml" or note.get("recipe") != hashlib.sha256(text.encode()).hexdigest():
        return ()
    same = {package for package, places in note["places"].items() if places and project.places(package) == places}
    return tuple(name for name in note["names"] if name.partition(":")[0].partition(".")[0] in same)


def knows_executor(run: RunDirectory) -> bool:
    """Whether this user has sent the run where its `executor.json` says."""
    return _note(run).get("executor") == _digest(run.executor)


def _note(run: RunDirectory) -> dict[str, Any]:
    try:
        note = json.loads(_file(run).read_text())
    except (OSError, ValueError):  # also if the home directory is unknown
        return {}
    return note if isinstance(note, dict) and note.get("run") == str(run.path.resolve()) else {}


def _file(run: RunDirectory) -> Path:
    folder = user_path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "fiddlehead" / "launched"
    return folder / f"{hashlib.sha256(os.fsencode(run.path.resolve())).hexdigest()[:32]}.json"


def _digest(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
