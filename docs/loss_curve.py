"""Draws the losses of a run: `python docs/loss_curve.py RUN [--out FILE]`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run
from fiddlehead.runs.curves import PALETTE
from fiddlehead.runs.picture import DPI, STYLE, measured_on, name_lines, write_note
from fiddlehead.runs.record import read_run


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
    figure.savefig(arguments.out or run.path / "loss.png", dpi=DPI)


def draw(run: RunDirectory) -> Figure:
    """The training and validation loss of a run over its steps, in nats per token.

    Where the validation says how many bytes a token stands for, the right axis has nats per byte.

    Raises:
        ConfigError: the run has logged no loss.
    """
    history = run.history()
    training, validation, per_byte = (
        list(zip(*history.points(column), strict=True)) for column in ("loss", "val_loss", "val_nats_per_byte")
    )
    if not training:
        raise ConfigError(f"run {run.name!r} has no loss in {run.metrics}")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5))
        axes = figure.add_subplot(title=f"{run.name}: loss", xlabel="step", ylabel="loss (nats per token)")
        axes.plot(*zip(*training, strict=True), color=PALETTE[0], label="training")
        if validation:
            axes.plot(*zip(*validation, strict=True), color=PALETTE[1], marker="o", label="validation")
        if per_byte:
            # The validation data are the same each time, so one factor serves all steps.
            bytes_per_token = validation[-1][1] / per_byte[-1][1]
            scales = partial(np.multiply, 1 / bytes_per_token), partial(np.multiply, bytes_per_token)
            right = axes.secondary_yaxis(1.22, functions=scales)
            right.set_ylabel("nats per byte")
        name_lines(axes)
        write_note(figure, measured_on(read_run(run).environment))
    return figure


if __name__ == "__main__":
    main()
