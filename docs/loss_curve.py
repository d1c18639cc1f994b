"""Draws the losses of a run: `python docs/loss_curve.py RUN [--out FILE]`."""

from __future__ import annotations

import argparse
import csv
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run

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
}
TRAINING, VALIDATION = "#6699cc", "#b3400f"


def main() -> None:
    """Draws the run that the command line names."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's directory, or its name in runs/")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture; RUN/loss.png if not given")
    arguments = parser.parse_args()
    try:
        run = find_run(arguments.run)
        figure = draw(run)
    except ConfigError as error:
        parser.error(str(error))
    figure.savefig(arguments.out or run.path / "loss.png", dpi=150)


def draw(run: RunDirectory) -> Figure:
    """The training and validation loss of a run over its steps, in nats per token.

    Where the validation says how many bytes a token stands for, the right axis has nats per byte.

    Raises:
        ConfigError: the run has logged no loss.
    """
    training, validation, per_byte = (read(run, column) for column in ("loss", "val_loss", "val_nats_per_byte"))
    if not training:
        raise ConfigError(f"run {run.name!r} has no loss in {run.metrics}")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(title=f"{run.name}: loss", xlabel="step", ylabel="loss (nats per token)")
        axes.plot(*zip(*training, strict=True), color=TRAINING, label="training")
        if validation:
            axes.plot(*zip(*validation, strict=True), color=VALIDATION, marker="o", label="validation")
        axes.grid()
        if per_byte:
            # The validation data are the same each time, so one factor serves all steps.
            bytes_per_token = validation[-1][1] / per_byte[-1][1]
            scales = partial(np.multiply, 1 / bytes_per_token), partial(np.multiply, bytes_per_token)
            right = axes.secondary_yaxis("right", functions=scales)
            right.set_ylabel("nats per byte")
        else:
            axes.spines["right"].set_visible(False)
        axes.legend(frameon=False)
    return figure


def read(run: RunDirectory, column: str) -> list[tuple[int, float]]:
    """Step and value of each row of the run's metrics that has a value in `column`; empty if it has no metrics."""
    if not run.metrics.exists():
        return []
    with run.metrics.open(newline="") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


if __name__ == "__main__":
    main()
