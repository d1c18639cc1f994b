"""Measurements as data, `{"figures": ..., "where": ...}`, and their comparison with earlier ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, Problem

UNCHANGED = 0.02
"""A figure that differs by less is taken for the same."""
LISTED = 20
"""Names of the figures without a counterpart."""
TIME_AND_LOAD = ("date", "load_average", "revision", "sm_mhz", "memory_mhz", "watts", "celsius")
"""Fields that differ between any two measurements and do not matter for a comparison."""


@dataclass(frozen=True)
class Change:
    """One figure, before and now."""

    name: str
    before: float
    now: float

    @property
    def relative(self) -> float:
        """The relative growth, as a fraction of the earlier value."""
        return (self.now - self.before) / abs(self.before) if self.before else float(self.now != 0)

    def __str__(self) -> str:
        return f"{self.relative:+.1%}"


@dataclass(frozen=True)
class Comparison:
    """The differences between two files of results."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    """Figures that only one of them has."""
    conditions: tuple[str, ...]
    """Other differences than the figures: another GPU, another version."""

    def lines(self) -> Iterator[str]:
        """Yields what to print: the conditions, and each figure that has changed."""
        yield from (f"measured differently: {condition}" for condition in self.conditions)
        changed = [change for change in self.changes if abs(change.relative) >= UNCHANGED]
        for change in changed:
            yield f"{change.name}: {change.before:.4g} before, {change.now:.4g} now, {change}"
        same = len(self.changes) - len(changed)
        yield f"{same} of {len(self.changes)} figures within {UNCHANGED:.0%} of before"
        if self.missing:
            more = len(self.missing) - LISTED
            listed = ", ".join(self.missing[:LISTED]) + (f", and {more} more" if more > 0 else "")
            yield f"in one of the two only: {listed}"


def read(file: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        ConfigError: they cannot be read, or are not results.
    """
    try:
        results = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {error.strerror}")) from None
    except ValueError:
        results = None
    if not isinstance(results, dict) or not isinstance(results.get("figures"), dict):
        message = "has no figures; `fiddlehead bench --json` and benchmarks/ write files that have them"
        raise ConfigError(Problem.in_file(file, message))
    return results


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Comparison:
    """Compares two files of results; for a spread, it compares the medians."""
    old, new = dict(_numbers(before["figures"])), dict(_numbers(now["figures"]))
    changes = tuple(Change(name, old[name], new[name]) for name in new if name in old)
    missing = tuple(name for name in (*old, *new) if (name in old) != (name in new))
    return Comparison(changes, missing, tuple(_conditions(before, now)))


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings and lists, each with its path."""
    if isinstance(value, Mapping):
        items: Any = {"median": value["median"]}.items() if "median" in value else value.items()
        for key, item in items:
            yield from _numbers(item, path if key == "median" else f"{path}.{key}" if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{path}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _conditions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for part in ("what", "where"):
        old, new = dict(_leaves(before.get(part, {}))), dict(_leaves(now.get(part, {})))
        for name in dict.fromkeys((*old, *new)):
            pair = old.get(name, "nothing"), new.get(name, "nothing")
            if pair[0] != pair[1] and name.rpartition(".")[2] not in TIME_AND_LOAD:
                yield f"{name} was {pair[0]} and is {pair[1]}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    elif value not in (None, []):
        yield path, value
