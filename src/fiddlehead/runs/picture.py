"""Draws charts with matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.runs.curves import PALETTE, Chart, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    # A solid background of its own, so that the picture reads on light and dark pages alike.
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
    "text.color": "#1f2328",
    "axes.labelcolor": "#1f2328",
    "axes.edgecolor": "#59636e",
    "xtick.color": "#59636e",
    "ytick.color": "#59636e",
    "grid.color": "#d1d9e0",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a name with dollar signs is a name
}
DASHES = ("solid", "dashed", "dotted", "dashdot")


def save(charts: Sequence[Chart], file: Path) -> None:
    """Draws charts one under the other into a picture; its suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed, does not know the format, or the file cannot be written.
    """
    save_figure(lambda: figure(charts), file)


def save_figure(draw: Callable[[], Figure], file: Path) -> None:
    """Saves the figure that `draw` makes; errors are those of `save`."""
    if find_spec("matplotlib") is None:
        raise ConfigError(Problem("--png", str(file), "needs matplotlib: pip install 'fiddlehead[plot]'"))
    try:
        draw().savefig(file, dpi=150, format=None if file.suffix else "png")
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("--png", str(file), f"cannot be written: {error}")) from error


def figure(charts: Sequence[Chart]) -> Figure:
    """The charts as one figure of matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        made = Figure(figsize=(8, 4.5 * max(1, len(charts))), layout="constrained")
        for number, chart in enumerate(charts, start=1):
            axes = made.add_subplot(len(charts), 1, number, title=chart.title, xlabel=chart.x_label)
            for place, curve in enumerate(chart.curves):
                colour, dashes = PALETTE[place % len(PALETTE)], DASHES[place // len(PALETTE) % len(DASHES)]
                marker = "o" if len(curve.xs) < 3 else None
                # A label that begins with _ is left out of a legend.
                (line,) = axes.plot(curve.xs, curve.ys, color=colour, linestyle=dashes, marker=marker)
                line.set_label(f"\u200b{curve.name}")
            axes.grid()
            axes.xaxis.set_major_formatter(lambda value, _: short(value))
            if chart.curves:
                axes.legend(frameon=False, fontsize="small")
    return made
