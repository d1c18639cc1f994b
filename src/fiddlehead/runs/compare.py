"""Compares runs: what differs in their recipes, code, data and machines, and how far they came."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddlehead.numbers import plain
from fiddlehead.run.history import History
from fiddlehead.runs.record import IDENTITY, Record

MISSING = "(not set)"
"""The value of what a run does not have."""
SHOWN_FILES = 20
"""The most differing files of code to name."""


@dataclass(frozen=True)
class Difference:
    """One thing in which runs differ."""

    section: str
    """recipe, code, data, machine or packages."""
    path: str
    values: tuple[Any, ...]
    """The value of each run; `MISSING` if a run has none."""


@dataclass(frozen=True)
class Result:
    """How far a run came in one metric; None is not logged."""

    final: float | None
    best: float | None
    best_step: int | None


def differences(records: Sequence[Record]) -> list[Difference]:
    """Everything in which runs differ, in the order of `Difference.section`."""
    sections: dict[str, Sequence[Mapping[str, Any]]] = {
        "recipe": [
            {path: value for path, value in record.recipe.items() if path not in IDENTITY} for record in records
        ],
        "code": _code(records),
        "data": [record.data for record in records],
        "machine": [record.machine for record in records],
        "packages": [_mapping(record.environment.get("packages")) for record in records],
    }
    return [
        Difference(section, path, values)
        for section, sides in sections.items()
        for path in dict.fromkeys(path for side in sides for path in side)
        if not _same(values := tuple(side.get(path, MISSING) for side in sides))
    ]


def results(histories: Sequence[History]) -> dict[str, list[Result]]:
    """For each metric, the final and the best value of each run; `seconds_*` and counts are left out."""
    names = dict.fromkeys(name for history in histories for name in history.columns)
    return {name: [_result(history, name) for history in histories] for name in names if not name.startswith("seconds")}


def _result(history: History, name: str) -> Result:
    step, value = history.best(name) or (None, None)
    return Result(history.last(name), value, step)


def _code(records: Sequence[Record]) -> Sequence[Mapping[str, Any]]:
    """The state of each run's code: commit, uncommitted changes, and the files of the copies that differ."""
    found: list[dict[str, Any]] = [_state(record) for record in records]
    copies = [record.code for record in records]
    if all(copy is not None for copy in copies):
        files = [_files(copy) for copy in copies if copy is not None]
        names = sorted(set().union(*files))
        changed = [name for name in names if not _same(tuple(side.get(name) for side in files))]
        for side, values in zip(found, files, strict=True):
            side |= {name: values[name][:12] for name in changed[:SHOWN_FILES] if name in values}
            if len(changed) > SHOWN_FILES:
                side["more files"] = f"{len(changed) - SHOWN_FILES}; {_digest(sorted(values.items()))}"
    return found


def _state(record: Record) -> dict[str, Any]:
    """The git commit of a run's code, and a checksum of its uncommitted changes."""
    git = _mapping(record.environment.get("git"))
    state: dict[str, Any] = {}
    if revision := record.shipped.get("revision") or git.get("revision"):
        state["revision"] = revision
    if patch := git.get("patch"):
        lines = str(patch).count("\n")
        state["uncommitted changes"] = f"{lines:,} lines, {_digest(patch)}"
    if untracked := git.get("untracked"):
        state["untracked files"] = untracked
    return state


def _files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file under a folder; links count by where they lead to, and are not followed."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_symlink():
            found[str(file.relative_to(folder))] = f"-> {file.readlink()}"
        elif file.is_file():
            found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(str(value).encode(errors="surrogateescape")).hexdigest()[:12]


def _mapping(value: Any) -> Mapping[str, Any]:
    """A mapping from a foreign file; empty for what is not one."""
    return value if isinstance(value, Mapping) else {}


def _same(values: tuple[Any, ...]) -> bool:
    """Whether values are all equal: 1, 1.0 and True are not, and two NaNs are."""
    return all(_equal(values[0], value) for value in values[1:])


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right):
        return True
    return type(left) is type(right) and left == right


def show_value(value: Any) -> str:
    """A value in a table, on one line and not too long: what a run says may come from anybody."""
    text = plain(value) if isinstance(value, float) else str(value)
    text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-35:]}"
