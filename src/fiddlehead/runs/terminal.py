"""Draws charts as text, with dots of braille characters: each has two columns and four rows of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fiddlehead.runs.curves import Chart, short, ticks

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan", "bright_magenta", "bright_black")
MARKERS = ("", "×", "+", "o", "*", "#", "@", "%")
"""What a curve is drawn with where there are no colours; "" is dots."""
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARGIN = 9
"""Characters to the left of the axis."""


def draw(chart: Chart, width: int, height: int = 14, *, colours: bool = True) -> Text:
    """The chart as lines of text, `width` characters wide at most.

    Args:
        height: the lines of the drawing itself; title, axis and names come in addition.
        colours: whether the curves are told apart by colours, or else by their characters.
    """
    from rich.text import Text

    columns = max(10, width - _MARGIN - 2)
    left, right, low, high = chart.bounds()
    cells: dict[tuple[int, int], tuple[int, int]] = {}  # row and column: dots, number of the curve
    for number, curve in enumerate(chart.curves):
        before = None
        for x, y in zip(curve.xs, curve.ys, strict=True):
            if not (math.isfinite(x) and math.isfinite(y)):
                before = None
                continue
            at = (
                round((x - left) / (right - left) * (2 * columns - 1)),
                round((high - y) / (high - low) * (4 * height - 1)),
            )
            for dot_x, dot_y in _line(before or at, at):
                place = dot_y // 4, dot_x // 2
                dots = cells.get(place, (0, 0))[0]
                cells[place] = dots | _DOTS[dot_y % 4][dot_x % 2], number
            before = at
    labels = {round((high - y) / (high - low) * (height - 1)): short(y) for y in ticks(low, high, max(2, height // 3))}
    made = Text(f"{chart.title}\n", style="bold")
    for row in range(height):
        made.append(f"{labels.get(row, ''):>{_MARGIN - 1}} {'┤' if row in labels else '│'}", style="dim")
        for column in range(columns):
            dots, number = cells.get((row, column), (0, 0))
            sign = (not colours and MARKERS[number % len(MARKERS)]) or chr(0x2800 + dots)
            made.append(sign if dots else " ", style=COLOURS[number % len(COLOURS)] if dots and colours else "")
        made.append("\n")
    ends = f"{short(left)}{chart.x_label:^{max(1, columns - len(short(left)) - len(short(right)))}}{short(right)}"
    made.append(f"{' ' * _MARGIN}└{'─' * columns}\n{' ' * (_MARGIN + 1)}{ends}\n", style="dim")
    for number, curve in enumerate(chart.curves):
        sign = (not colours and MARKERS[number % len(MARKERS)]) or "⣀"
        made.append(f"{' ' * _MARGIN} {sign * 2} ", style=COLOURS[number % len(COLOURS)] if colours else "")
        made.append(f"{curve.name}\n")
    return made


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots between two, with both."""
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * part / count), round(start[1] + (end[1] - start[1]) * part / count))
        for part in range(count + 1)
    ]
