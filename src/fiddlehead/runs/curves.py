"""Charts of runs as values: which curves to draw, over which axis, how smooth. The other modules draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.numbers import figure
from fiddlehead.run.history import Axis, smoothed
from fiddlehead.runs.record import Record

AXIS_LABELS = {"step": "step", "tokens": "tokens", "hours": "hours of training steps"}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The colours of curves: those that Okabe and Ito chose for people who see colours differently. Yellow and black are
left out: one is hard to see on a light page, the other on a dark one."""
NATS = ("loss", "val_loss")
"""The metrics whose names do not have their unit."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    xs: list[float]
    ys: list[float]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    title: str
    x_label: str
    curves: list[Curve]

    @property
    def y_label(self) -> str:
        """The metric with its unit."""
        return f"{self.title} (nats)" if self.title in NATS else self.title

    def bounds(self) -> tuple[float, float, float, float]:
        """The lowest and highest x, then the lowest and highest y, of the finite points; 0 to 1 if there are none."""
        points = [
            (x, y)
            for curve in self.curves
            for x, y in zip(curve.xs, curve.ys, strict=True)
            if math.isfinite(x) and math.isfinite(y)
        ]
        xs, ys = [x for x, _ in points] or [0.0, 1.0], [y for _, y in points] or [0.0, 1.0]
        return *_apart(min(xs), max(xs)), *_apart(min(ys), max(ys))


def charts(
    records: Sequence[Record], metrics: Sequence[str] = (), axis: Axis = "step", smooth: float = 0
) -> list[Chart]:
    """A chart for each metric, with a curve for each run that has logged it.

    Args:
        metrics: by default `loss` and `val_loss`, those of them that a run has.
        smooth: the weight of `history.smoothed`, from 0 (as logged) to below 1.

    Raises:
        ConfigError: no run has a metric, or what the axis needs; or `smooth` is out of range.
    """
    if not 0 <= smooth < 1:
        raise ConfigError(Problem("--smooth", smooth, "must be at least 0 and below 1"))
    known = dict.fromkeys(name for record in records for name in record.history.columns)
    for metric in metrics:
        if metric not in known:
            raise ConfigError(Problem.unknown("--metric", metric, "metric", known))
    chosen = list(metrics) or [name for name in ("loss", "val_loss") if name in known]
    names = unique_names(records)
    return [
        Chart(
            metric,
            AXIS_LABELS[axis],
            [
                Curve(name, xs, smoothed(ys, smooth) if smooth else ys)
                for name, record in zip(names, records, strict=True)
                for xs, ys in [_curve(record, metric, axis)]
                if xs
            ],
        )
        for metric in dict.fromkeys(chosen)
    ]


def unique_names(records: Sequence[Record]) -> list[str]:
    """The name of each run; of runs with the same name, their folders."""
    names = [record.name for record in records]
    return [str(record.path) if names.count(record.name) > 1 else record.name for record in records]


def line_width(number: int, count: int) -> float:
    """The width of the curve with this number among `count` in a chart, in widths of a curve that is alone.

    Each is narrower than those under it, so none is hidden where they run together.
    """
    return 1.5 - 0.8 * number / (count - 1) if count > 1 else 1.0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number of an axis in few characters: 1.5M, 0.003, 2e-5."""
    size = abs(value)
    if size >= 1e15:
        return f"{value:.4g}".replace("e+", "e")
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.4g}{letter}"
    return figure(value, 4)


def short_name(name: str, most: int = 32) -> str:
    """A name in a picture: of a long one the beginning and the end."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def _curve(record: Record, metric: str, axis: Axis) -> tuple[list[float], list[float]]:
    try:
        return record.history.curve(metric, axis)
    except ConfigError as error:
        raise ConfigError(*(f"run {record.name}: {problem}" for problem in error.problems)) from None


def _apart(low: float, high: float) -> tuple[float, float]:
    """The two ends of an axis, which must not be the same."""
    if high > low and math.isfinite(high - low):
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, low + margin
