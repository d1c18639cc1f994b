"""Draws charts as SVG in HTML. A script can make them interactive; without one they read as well."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape

from fiddlehead.run.history import thinned
from fiddlehead.runs.curves import PALETTE, Chart, Curve, line_width, short, ticks

WIDTH, HEIGHT = 420, 230
"""The units of a chart; a phone shows them about as large as they are."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 8, 36


def figure(chart: Chart) -> str:
    """A chart as a `figure` element, with its names, and its points as JSON for the script."""
    thin = Chart(
        chart.title, chart.x_label, [Curve(curve.name, *thinned(curve.xs, curve.ys)) for curve in chart.curves]
    )
    names = "".join(
        f'<li><span class="key c{number % len(PALETTE)}"></span>{escape(curve.name)}</li>'
        for number, curve in enumerate(thin.curves)
    )
    legend = f"<ul class=legend>{names}</ul>" if len(thin.curves) > 1 else ""
    title = escape(chart.y_label)
    return (
        f"<figure class=chart><figcaption>{title}</figcaption><div class=plot>{_svg(thin)}</div>{legend}"
        f"<script type=application/json>{_points(thin)}</script></figure>"
    )


def script_json(value: object) -> str:
    """JSON that cannot end the script element in which it stands."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _points(chart: Chart) -> str:
    curves = [
        {"name": curve.name, "xs": curve.xs, "ys": [y if math.isfinite(y) else None for y in curve.ys]}
        for curve in chart.curves
    ]
    return script_json({"x": chart.x_label, "curves": curves})


def _svg(chart: Chart) -> str:
    left, right, low, high = chart.bounds()
    margin = (high - low) * 0.04
    low, high = low - margin, high + margin

    def across(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _TOP + (high - y) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    bottom, parts = HEIGHT - _BOTTOM, []
    for y in ticks(low, high, 5):
        parts.append(f'<line class=grid x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor=end>{short(y)}</text>')
    for x in ticks(left, right, 5):
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 15}" text-anchor=middle>{short(x)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor=middle>{escape(chart.x_label)}</text>')
    for number, curve in enumerate(chart.curves):
        classes = f"line c{number % len(PALETTE)} d{number // len(PALETTE) % 4}"
        for points in _pieces(curve):
            if len(points) == 1:
                (x, y), *_ = points
                parts.append(
                    f'<circle class="dot c{number % len(PALETTE)}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>'
                )
            else:
                text = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
                width = 1.5 * line_width(number, len(chart.curves))
                parts.append(f'<polyline class="{classes}" stroke-width="{width:.2f}" points="{text}"/>')
    if not chart.curves:
        parts.append(f'<text x="{middle}" y="{HEIGHT / 2}" text-anchor=middle>nothing was logged</text>')
    label = escape(f"{chart.title} over {chart.x_label}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{label}">{"".join(parts)}</svg>'


def _pieces(curve: Curve) -> Iterator[Sequence[tuple[float, float]]]:
    """The parts of a curve between points that are not finite."""
    points: list[tuple[float, float]] = []
    for x, y in zip(curve.xs, curve.ys, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            points.append((x, y))
        elif points:
            yield points
            points = []
    if points:
        yield points
