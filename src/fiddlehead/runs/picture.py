"""Draws pictures with matplotlib, which is an optional extra: one style for those of runs and of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.runs.curves import PALETTE, Chart, line_width, short, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, DIM, FAINT = "#1f2328", "#59636e", "#d1d9e0"
"""The colours of text, of what is beside it, and of lines behind."""
LINE = 2
"""The width of a curve that is alone, in points."""
STYLE: dict[Any, Any] = {
    # A solid background of its own, so that the picture reads on light and dark pages alike.
    "figure.facecolor": "#ffffff",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "#ffffff",
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler(color={list(PALETTE)})",
    "axes.grid": True,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": DIM,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "font.size": 12,
    "lines.linewidth": LINE,
    "lines.markersize": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a name with dollar signs is a name
}
DASHES = ("solid", "dashed", "dotted", "dashdot")
DPI = 150


def save(charts: Sequence[Chart], file: Path, note: str = "") -> None:
    """Draws charts one under the other into a picture; its suffix says the format.

    Args:
        note: stands under the charts: where they were measured.

    Raises:
        ConfigError: matplotlib is not installed, does not know the format, or the file cannot be written.
    """
    save_figure(lambda: figure(charts, note), file)


def save_figure(draw: Callable[[], Figure], file: Path) -> None:
    """Saves the figure that `draw` makes; errors are those of `save`."""
    if find_spec("matplotlib") is None:
        raise ConfigError(Problem("--png", str(file), "needs matplotlib: pip install 'fiddlehead[plot]'"))
    try:
        draw().savefig(file, dpi=DPI, format=None if file.suffix else "png")
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("--png", str(file), f"cannot be written: {error}")) from error


def figure(charts: Sequence[Chart], note: str = "") -> Figure:
    """The charts as one figure of matplotlib; `note` as in `save`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        made = Figure(figsize=(8, 4.5 * max(1, len(charts))))
        for number, chart in enumerate(charts, start=1):
            axes = made.add_subplot(len(charts), 1, number, title=chart.y_label, xlabel=chart.x_label)
            for place, curve in enumerate(chart.curves):
                colour, dashes = PALETTE[place % len(PALETTE)], DASHES[place // len(PALETTE) % len(DASHES)]
                marker = "o" if len(curve.xs) < 3 else None
                style = {"color": colour, "linestyle": dashes, "marker": marker}
                width = LINE * line_width(place, len(chart.curves))
                axes.plot(curve.xs, curve.ys, **style, linewidth=width, label=f"\u200b{curve.name}")
            axes.xaxis.set_major_formatter(lambda value, _: short(value))
            name_lines(axes)
        write_note(made, note)
    return made


def name_lines(axes: Axes) -> None:
    """Writes the name of each line beside its last point, instead of a legend.

    Names that would cover each other are moved apart. A label that begins with _ is not written.
    """
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    size = 0.9 * float(axes.xaxis.label.get_fontsize())
    gap = line_height(axes, size)
    ends = []
    for line in axes.lines:
        points = np.asarray(line.get_xydata(), dtype=float)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) and not str(line.get_label()).startswith("_"):
            x, y = to_axes.transform(points[-1])
            ends.append((line, points[-1], 1.04 if x > 0.9 else x + 0.03, min(y, 1.0)))
    for group in ([end for end in ends if end[2] > 1], [end for end in ends if end[2] <= 1]):
        for (line, end, x, _), y in zip(group, apart([y for *_, y in group], gap), strict=True):
            axes.annotate(
                short_name(str(line.get_label())),
                xy=end,
                xytext=(x, y),
                textcoords="axes fraction",
                va="center",
                fontsize=size,
                arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 1.2, "shrinkA": 1, "shrinkB": 2},
                bbox=None if x > 1 else {"facecolor": "#ffffff", "edgecolor": "none", "alpha": 0.75, "pad": 1},
                annotation_clip=False,
            )


def line_height(axes: Axes, size: float) -> float:
    """The height of a line of text of `size` points, as a part of the height of the axes."""
    return size * 1.3 * axes.get_figure(root=True).dpi / 72 / axes.bbox.height  # pyright: ignore[reportOptionalMemberAccess]


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places that are nearest to the given ones, in the same order, and at least `gap` from each other."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    blocks: list[list[float]] = []  # sum and number of places that touch, each less the gaps below it
    for rank, index in enumerate(order):
        blocks.append([places[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    levels = [total / count for total, count in blocks for _ in range(round(count))]
    found = dict(zip(order, (level + rank * gap for rank, level in enumerate(levels)), strict=True))
    return [found[index] for index in range(len(places))]


def write_note(made: Figure, note: str) -> None:
    """Writes a line under a figure, at its left."""
    if note:
        made.supxlabel(note, x=0.01, ha="left", fontsize=9, color=DIM)


def measured_on(where: Mapping[str, Any]) -> str:
    """The device, the versions and the date in one line, of the `where` of results or the environment of a run.

    What is missing, or is not what it should be, is left out.
    """
    listed = where.get("gpus")
    gpus = [_text(gpu, "name").partition(",")[0] for gpu in listed] if isinstance(listed, list) else []
    cores = _text(where.get("cores") or where.get("cpus"))
    device = _text(where.get("gpu") or where.get("device"))
    device = device or (f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else "".join(gpus))
    device = device or (f"{_text(where.get('cpu')) or 'CPU'}, {cores} cores" if cores else "")
    sides = [side for side in (where.get("versions"), where.get("packages")) if isinstance(side, Mapping)]
    versions = {
        name: next((_text(side[key], "version") for side in sides if key in side), "") for key, name in NOTED.items()
    }
    known = [f"{name} {version}" for name, version in versions.items() if version[:1].isdigit()]
    return " · ".join(filter(None, [device, *known, _text(where.get("date"))[:10]]))


NOTED = {
    "torch": "torch",
    "cudnn": "cuDNN",
    "flash2": "flash-attn",
    "flash3": "flash-attn-3",
    "flash4": "flash-attn-4",
}
"""The packages on whose versions a measurement depends."""


def _text(value: Any, key: str = "") -> str:
    """A text or number, or the one at `key` of a mapping; empty for anything else."""
    value = value.get(key) if isinstance(value, Mapping) else value
    return str(value) if isinstance(value, str | int | float) else ""
