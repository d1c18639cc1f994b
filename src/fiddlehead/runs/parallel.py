"""The runs of a sweep as a picture of parallel coordinates: an axis for each edited value, the last one the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from fiddlehead.runs.curves import PALETTE, short, ticks
from fiddlehead.runs.page import Html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 420, 260
_TOP, _BOTTOM, _SIDE = 30, 20, 46


@dataclass(frozen=True)
class Coordinate:
    """One axis."""

    name: str
    places: list[float | None]
    """Where each run is on it, from 0 (bottom) to 1 (top); None is nowhere."""
    marks: list[tuple[float, str]]
    """Places with their labels."""


def coordinate(name: str, values: Sequence[str | float | None]) -> Coordinate:
    """The axis of values. Numbers keep their distances; those that span a factor of ten or more do so on a logarithmic
    scale. Values of which one is not a number are placed evenly, in their order."""
    numbers = [_number(value) for value in values]
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    if not known or any(number is None and value is not None for number, value in zip(numbers, values, strict=True)):
        texts = list(dict.fromkeys(str(value) for value in values if value is not None))
        places = {text: (index + 0.5) / len(texts) for index, text in enumerate(texts)}
        return Coordinate(
            name,
            [None if value is None else places[str(value)] for value in values],
            [(place, text) for text, place in places.items()],
        )
    logarithmic = min(known) > 0 and max(known) >= 10 * min(known)
    low, high = (math.log10(end) if logarithmic else end for end in (min(known), max(known)))
    if low == high:
        low, high = low - 1, high + 1

    def place(number: float) -> float:
        return ((math.log10(number) if logarithmic else number) - low) / (high - low)

    distinct = sorted(set(known))
    labelled = (
        distinct if len(distinct) <= 6 else [10**each for each in ticks(low, high)] if logarithmic else ticks(low, high)
    )
    return Coordinate(
        name,
        [None if number is None or not math.isfinite(number) else place(number) for number in numbers],
        [(place(number), short(number)) for number in labelled],
    )


def svg(coordinates: Sequence[Coordinate], names: Sequence[str], best: int) -> Html:
    """The picture; the first `best` runs are in colours, and named below it."""
    xs = [_SIDE + index * (WIDTH - 2 * _SIDE) / max(1, len(coordinates) - 1) for index in range(len(coordinates))]

    def down(place: float) -> float:
        return HEIGHT - _BOTTOM - place * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for number in reversed(range(len(names))):  # the best on top
        points = [(x, each.places[number]) for x, each in zip(xs, coordinates, strict=True)]
        text = " ".join(f"{x:.1f},{down(place):.1f}" for x, place in points if place is not None)
        kind = f"line c{number % len(PALETTE)} d{number // len(PALETTE) % 4}" if number < best else "line grid"
        parts.append(f'<polyline class="{kind}" points="{text}"><title>{escape(names[number])}</title></polyline>')
    for index, (x, each) in enumerate(zip(xs, coordinates, strict=True)):
        parts.append(f'<line class=axis x1="{x:.1f}" x2="{x:.1f}" y1="{down(0)}" y2="{down(1)}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{12 + 11 * (index % 2)}" text-anchor=middle>{escape(_last(each.name))}</text>'
        )
        end = index == len(coordinates) - 1
        beside = f'x="{x + (4 if end else -4):.1f}" text-anchor={"start" if end else "end"}'
        parts += [f'<text {beside} y="{down(place) + 4:.1f}">{escape(_cut(text))}</text>' for place, text in each.marks]
    keys = "".join(
        f'<li><span class="key c{number % len(PALETTE)}"></span>{escape(name)}</li>'
        for number, name in enumerate(names[:best])
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="parallel coordinates">{"".join(parts)}</svg>'
    return Html(f"<figure class=parallel>{picture}<ul class=legend>{keys}</ul></figure>")


def figure(coordinates: Sequence[Coordinate], names: Sequence[str], best: int) -> Figure:
    """The same picture as a figure of matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    from fiddlehead.runs.picture import DASHES, DIM, FAINT, STYLE, apart, line_height, name_lines

    with mpl.rc_context({**STYLE, "axes.grid": False}):
        made = Figure(figsize=(max(8, 1.8 * len(coordinates)), 4.5))
        axes = made.add_subplot()
        for number in reversed(range(len(names))):
            points = [(x, each.places[number]) for x, each in enumerate(coordinates)]
            xs = [x for x, place in points if place is not None]
            ys = [place for _, place in points if place is not None]
            named = number < best
            (line,) = axes.plot(xs, ys, color=PALETTE[number % len(PALETTE)] if named else FAINT)
            line.set(linewidth=2 if named else 1, linestyle=DASHES[number // len(PALETTE) % 4] if named else "solid")
            line.set_label(f"\u200b{names[number]}" if named else "_")
        axes.set_xlim(-0.6, len(coordinates) - 0.98)
        axes.set_ylim(-0.05, 1.05)
        name_lines(axes)
        halo = [withStroke(linewidth=3, foreground="white")]
        for x, each in enumerate(coordinates):
            axes.vlines(x, 0, 1, color=DIM, linewidth=1)
            places = apart(
                [place for place, _ in each.marks], 1.1 * line_height(axes, 10)
            )  # the axes go from -0.05 to 1.05
            for (_, text), place in zip(each.marks, places, strict=True):
                axes.annotate(
                    f"{_cut(text)} ", (x, place), ha="right", va="center", fontsize=10, path_effects=halo, zorder=4
                )
        axes.set_xticks(range(len(coordinates)), [_last(each.name) for each in coordinates])
        axes.tick_params(bottom=False)
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
    return made


def save(coordinates: Sequence[Coordinate], names: Sequence[str], best: int, file: Path) -> None:
    """Draws the picture into a file; errors are those of `picture.save`."""
    from fiddlehead.runs.picture import save_figure

    save_figure(lambda: figure(coordinates, names, best), file)


def _number(value: str | float | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _last(path: str) -> str:
    """The last word of a path, which is enough to know it by."""
    return path.rpartition(".")[2]


def _cut(text: str) -> str:
    return text if len(text) <= 14 else f"{text[:13]}…"
