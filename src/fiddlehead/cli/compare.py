"""`fiddlehead runs compare` and `plot`: what runs differ in, and their curves."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fiddlehead.cli.common import add_row, table
from fiddlehead.cli.common import show as show_things
from fiddlehead.cli.runs import DirOption, RunsArgument
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path

if TYPE_CHECKING:
    from fiddlehead.run.history import Axis
    from fiddlehead.runs.curves import Chart
    from fiddlehead.runs.record import Record

MAX_PACKAGES = 10
"""The most differing packages to list."""

MetricOption = typer.Option(
    None, "--metric", "-m", metavar="NAME", help="Draw this; repeat it for several. By default loss and val_loss."
)
AxisOption = typer.Option("step", "--x", metavar="AXIS", help="Over what: step, tokens or hours (of training steps).")
SmoothOption = typer.Option(0.0, "--smooth", metavar="WEIGHT", help="Smooth the curves: 0 as logged, 0.9 strongly.")
PngOption = typer.Option("", "--png", metavar="FILE", help="Draw into a picture; the suffix may be .svg or .pdf too.")
HtmlOption = typer.Option("", "--html", metavar="FILE", help="Write one HTML file that zooms and needs no network.")
CsvOption = typer.Option("", "--csv", metavar="FILE", help="Write every logged value, unsmoothed; - is the terminal.")
JsonOption = typer.Option(False, "--json", help="Print results, recipes, curves and differences as JSON.")


def compare(
    names: list[str] = RunsArgument,
    metrics: list[str] = MetricOption,
    axis: str = AxisOption,
    smooth: float = SmoothOption,
    png: str = PngOption,
    html: str = HtmlOption,
    csv: str = CsvOption,
    as_json: bool = JsonOption,
    directory: str = DirOption,
) -> None:
    """Compare runs: what differs in recipe, code, data and machine, the results, and the curves.

    A run is a name, a folder (also one copied from another machine), or a folder that W&B wrote offline.

    Example:  fiddlehead runs compare a b --x tokens --smooth 0.9
    """
    records = open_records(names, directory)
    if len(records) < 2:
        raise ConfigError(f"there is nothing to compare {records[0].name!r} with; name two runs or more")
    charts = _charts(records, metrics, axis, smooth)
    if not _deliver(records, charts, axis, png, html, csv, as_json):
        show_differences(records)
        show_charts(charts)


def plot(
    names: list[str] = RunsArgument,
    metrics: list[str] = MetricOption,
    axis: str = AxisOption,
    smooth: float = SmoothOption,
    png: str = PngOption,
    html: str = HtmlOption,
    csv: str = CsvOption,
    as_json: bool = JsonOption,
    directory: str = DirOption,
) -> None:
    """Draw the curves of one or more runs, in the terminal or into a file.

    Example:  fiddlehead runs plot a b --metric val_loss --png loss.png
    """
    records = open_records(names, directory)
    charts = _charts(records, metrics, axis, smooth)
    if not _deliver(records, charts, axis, png, html, csv, as_json):
        show_charts(charts)


def open_records(names: Sequence[str], directory: str) -> list[Record]:
    """The records of runs; says what of them cannot be read."""
    from fiddlehead.runs import open_record

    records = [open_record(name, directory) for name in names]
    for problem in (problem for record in records for problem in record.problems):
        print(f"WARNING: {problem}", file=sys.stderr)  # noqa: T201
    return records


def show_differences(records: Sequence[Record]) -> None:
    """Prints what runs differ in, and their results."""
    from fiddlehead.runs import compare as comparing
    from fiddlehead.runs.curves import unique_names
    from fiddlehead.runs.export import result_rows

    names = [comparing.show_value(name) for name in unique_names(records)]
    found = comparing.differences(records)
    for section in dict.fromkeys(each.section for each in found):
        made = table(section, *names)
        those = [each for each in found if each.section == section]
        shown = those[:MAX_PACKAGES] if section == "packages" else those
        for each in shown:
            add_row(made, each.path, *map(comparing.show_value, each.values))
        if len(shown) < len(those):
            add_row(made, f"and {len(those) - len(shown)} more (--json lists them)", *([""] * len(names)))
        show_things(made, "")
    if not found:
        print("no difference in recipe, code, data and machine, as far as they are recorded\n")  # noqa: T201
    made = table("result", *names)
    for row in result_rows(records):
        add_row(made, *row)
    show_things(made, "")


def show_charts(charts: Sequence[Chart]) -> None:
    """Draws charts in the terminal."""
    from fiddlehead.runs import terminal

    if not charts:
        print("no loss was logged yet; --metric draws another metric")  # noqa: T201
    colours = sys.stdout.isatty()
    width = min(shutil.get_terminal_size().columns, 120)
    show_things(*(terminal.draw(chart, width, colours=colours) for chart in charts))


def _deliver(
    records: Sequence[Record], charts: Sequence[Chart], axis: str, png: str, html: str, csv: str, as_json: bool
) -> bool:
    """Writes the files that are asked for; returns whether there are any, or JSON was printed."""
    from fiddlehead.runs import export

    if csv:
        text = io.StringIO()
        export.write_csv(records, text, _axis(axis))
        write_text("--csv", csv, text.getvalue())
    if html:
        write_text("--html", html, export.comparison_page(records, charts))
    if png:
        from fiddlehead.runs import picture

        notes = dict.fromkeys(picture.measured_on(record.environment) for record in records)
        picture.save(charts, user_path(png), "\n".join(filter(None, notes)))
        say_written(png)
    if as_json:
        print(json.dumps(export.to_json(records, charts), indent=1, allow_nan=False))  # noqa: T201
    return bool(csv or html or png or as_json)


def _charts(records: Sequence[Record], metrics: Sequence[str] | None, axis: str, smooth: float) -> list[Chart]:
    from fiddlehead.runs import curves

    return curves.charts(records, metrics or (), _axis(axis), smooth)


def _axis(name: str) -> Axis:
    from fiddlehead.run.history import AXES

    for axis in AXES:
        if axis == name:
            return axis
    raise ConfigError(Problem.unknown("--x", name, "axis", AXES))


def write_text(option: str, file: str, text: str) -> None:
    """Writes a file and says so; - is the terminal."""
    from fiddlehead.runs.export import write

    if file == "-":
        print(text, end="")  # noqa: T201
        return
    write(option, Path(user_path(file)), text)
    say_written(file)


def say_written(file: str) -> None:
    """Says that a file was written; standard output is for what was asked for."""
    print(f"wrote {file}", file=sys.stderr)  # noqa: T201
