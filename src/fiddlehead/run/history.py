"""All values of a run's metrics: `metrics.csv` as columns, and curves over steps, tokens or hours."""

from __future__ import annotations

import bisect
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fiddlehead.errors import ConfigError, Problem

Axis = Literal["step", "tokens", "hours"]
AXES: tuple[Axis, ...] = ("step", "tokens", "hours")
NEEDED = {"tokens": "tokens", "hours": "seconds_per_step"}
"""The column from which an axis is worked out."""


@dataclass(frozen=True)
class History:
    """The logged rows of a run; validation has rows of its own, so a column has gaps."""

    steps: list[int]
    """The step of each row, in the order of the file."""
    columns: dict[str, list[float | None]]
    """For each metric a value for each row; None is not logged. NaN and infinity are values."""
    spoiled: list[str] = field(default_factory=list)
    """What could not be read, for the user."""

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """The steps and values of the rows that have the metric `name`."""
        values = self.columns.get(name, [])
        pairs = [(step, value) for step, value in zip(self.steps, values, strict=False) if value is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None if there is none."""
        _, values = self.points(name)
        return values[-1] if values else None

    def best(self, name: str) -> tuple[int, float] | None:
        """The step and the value where a metric was best; None if it never was finite, or `better` has no answer."""
        steps, values = self.points(name)
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        direction = better(name)
        if not finite or direction is None:
            return None
        value, step = max(finite, key=lambda pair: pair[0]) if direction == "higher" else min(finite)
        return step, value

    def curve(self, name: str, axis: Axis = "step") -> tuple[list[float], list[float]]:
        """The curve of a metric over an axis.

        Tokens lie on a line between the steps that logged them. Hours are those of the training steps: without
        validation, checkpoints, and the time between two attempts.

        Raises:
            ConfigError: the run has not logged what the axis is worked out from.
        """
        steps, values = self.points(name)
        return self.along(axis, steps), values

    def along(self, axis: Axis, steps: Sequence[int]) -> list[float]:
        """Where steps lie on an axis; see `curve`."""
        if axis == "step" or not steps:
            return [float(step) for step in steps]
        known = [(0, 0.0), *sorted(zip(*self.points(NEEDED[axis]), strict=True))]
        if len(known) == 1:
            message = f"the run has logged no {NEEDED[axis]}, from which this axis is worked out"
            raise ConfigError(Problem("--x", axis, message, [each for each in AXES if each != axis]))
        if axis == "hours":
            known = _added_up(known)
        return [_between(known, step) for step in steps]


def better(name: str) -> Literal["higher", "lower"] | None:
    """Which values of a metric are the better ones; None if that cannot be said, as of a learning rate."""
    if name.endswith("_per_s") or name.startswith("mfu") or "accuracy" in name:
        return "higher"
    return "lower" if any(word in name for word in ("loss", "nats", "perplexity")) else None


def read(file: Path) -> History:
    """The history in a `metrics.csv`; empty if there is no file yet. A last row that is cut short is left out.

    Cells that are not numbers, and rows without a step, are left out and said in `spoiled`.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace").replace("\0", "\ufffd")
    except FileNotFoundError:
        return History([], {})
    except OSError as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {error.strerror}")) from error
    whole, _, _cut_short = text.rpartition("\n")
    return from_rows(_dict_rows(whole.split("\n")))


def from_rows(rows: Iterable[Mapping[str, str | float]]) -> History:
    """A history of rows with a `step`; "" is not logged."""
    steps: list[int] = []
    columns: dict[str, list[float | None]] = {}
    spoiled: dict[str, None] = {}
    for row in rows:
        step = _whole(row.get("step", ""))
        if step is None:
            spoiled[f"a row has step={row.get('step', '')!r}, and is left out"] = None
            continue
        for name, cell in row.items():
            if name == "step" or cell == "":
                continue
            value = _number(cell)
            if value is None:
                spoiled[f"step {step} has {name}={cell!r}, which is not a number"] = None
                continue
            column = columns.setdefault(name, [])
            column += [None] * (len(steps) - len(column))
            column.append(value)
        steps.append(step)
    for column in columns.values():
        column += [None] * (len(steps) - len(column))
    return History(steps, columns, list(spoiled))


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """The exponential moving average of values, corrected for its start as TensorBoard does.

    Each value is the mean of those so far, where one that is n values back counts `weight`**n. Values that are not
    finite stay as they are, and do not count.
    """
    found, mean, total = [], 0.0, 0.0
    for value in values:
        if not math.isfinite(value):
            found.append(value)
            continue
        mean, total = weight * mean + value, weight * total + 1
        found.append(mean / total)
    return found


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = 2000) -> tuple[list[float], list[float]]:
    """At most about `most` points of a curve: the lowest and the highest of each part, so that no peak is lost."""
    if len(xs) <= most:
        return list(xs), list(ys)
    kept = {0, len(xs) - 1}
    size = 2 * len(xs) / most
    for part in range(most // 2):
        indices = range(int(part * size), min(len(xs), int((part + 1) * size)))
        finite = [index for index in indices if math.isfinite(ys[index])]
        if finite:
            kept |= {min(finite, key=ys.__getitem__), max(finite, key=ys.__getitem__)}
        kept |= {index for index in indices if index not in finite} if len(finite) < len(indices) else set()
    chosen = sorted(kept)
    return [xs[index] for index in chosen], [ys[index] for index in chosen]


def _dict_rows(lines: list[str]) -> Iterable[dict[str, str]]:
    """The rows as dictionaries. Each line is read alone, so that a damaged one spoils no other."""
    header: list[str] = []
    for line in lines:
        try:
            cells = next(csv.reader([line]), [])
        except csv.Error:
            cells = [line]
        if not header:
            header = cells
        elif cells:
            yield dict(zip(header, cells, strict=False))


def _added_up(known: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The hours at each step, from the mean seconds of the steps up to it since the step before."""
    total, before, found = 0.0, 0, [(0, 0.0)]
    for step, seconds in known[1:]:
        total += max(0, step - before) * seconds / 3600
        before = max(before, step)
        found.append((step, total))
    return found


def _between(known: Sequence[tuple[int, float]], step: int) -> float:
    """The value at `step` on the line through known points; after the last, that of the last two."""
    place = bisect.bisect_left(known, step, key=lambda point: point[0])
    if place < len(known) and known[place][0] == step:
        return known[place][1]
    place = min(max(place, 1), len(known) - 1)
    (left, low), (right, high) = known[place - 1], known[place]
    return high if right == left else low + (high - low) * (step - left) / (right - left)


def _whole(cell: str | float) -> int | None:
    value = _number(cell)
    return int(value) if value is not None and math.isfinite(value) and value == int(value) else None


def _number(cell: str | float) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
