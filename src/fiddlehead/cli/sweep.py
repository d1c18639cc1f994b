"""`fiddlehead runs sweep`: the results of a sweep as a table, a picture or a file."""

from __future__ import annotations

import csv as csv_files
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from fiddlehead.cli.common import add_row, table
from fiddlehead.cli.common import show as show_things
from fiddlehead.cli.compare import CsvOption, PngOption, say_written, write_text
from fiddlehead.cli.runs import COLOURS, DirOption
from fiddlehead.files.paths import user_path
from fiddlehead.run import damage

if TYPE_CHECKING:
    from fiddlehead.launch.sweep import Sweep, Variant
    from fiddlehead.run.status import Status

    Row = tuple[Variant, Status | None, float | None]


def sweep(
    name: str = typer.Argument(metavar="SWEEP", help="A sweep's name."),
    metric: str = typer.Option("", "--metric", help="Sort by this; by default val_loss, or else loss."),
    best: int = typer.Option(5, "--best", min=1, max=8, help="How many runs to draw in colours and to name."),
    png: str = PngOption,
    html: str = typer.Option("", "--html", metavar="FILE", help="Write one page: picture, curves of the best, table."),
    csv: str = CsvOption,
    as_json: bool = typer.Option(False, "--json", help="Print the runs as JSON, with all values of their recipes."),
    directory: str = DirOption,
) -> None:
    """Show the results of a sweep, the best first: the lowest metric, or of rates the highest.

    Pictures are of parallel coordinates: an axis for each edited value, and a line for each run.

    Example:  fiddlehead runs sweep lr --metric loss --html lr.html
    """
    from fiddlehead.launch import sweep as sweeps

    found = sweeps.load(name, directory)
    metric = sweeps.metric_of(found, metric)
    rows = sweeps.results(found, metric)
    if csv:
        write_text("--csv", csv, _csv(rows, metric))
    if html:
        write_text("--html", html, _page(found, rows, metric, best))
    if png:
        from fiddlehead.runs import parallel

        parallel.save(*_coordinates(rows, metric), best, user_path(png))
        say_written(png)
    if as_json:
        print(json.dumps(_values(found, rows, metric), indent=1, allow_nan=False))  # noqa: T201
    if not (csv or html or png or as_json):
        show_results(found, metric)


def show_results(found: Sweep, metric: str) -> None:
    """Prints a sweep's runs as a table, the best value of `metric` first."""
    from rich.text import Text

    from fiddlehead.launch import sweep as sweeps

    metric = sweeps.metric_of(found, metric)
    made = table(*found.variants[0].values, metric, "state", "run")
    for variant, status, value in sweeps.results(found, metric):
        shown = "" if value is None else f"{value:.4f}"
        state = Text(str(status.state), style=COLOURS[status.state]) if status else ""
        add_row(made, *variant.values.values(), shown, state, variant.name)
    show_things(made)
    for run in found.runs():
        for problem in damage.find(run):
            print(f"WARNING: {problem}", file=sys.stderr)  # noqa: T201


def _csv(rows: Sequence[Row], metric: str) -> str:
    text = io.StringIO()
    writer = csv_files.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", *rows[0][0].values, metric])
    for variant, status, value in rows:
        cells = [*variant.values.values(), "" if value is None else value]
        writer.writerow([variant.name, status.state if status else "", *cells])
    return text.getvalue()


def _values(found: Sweep, rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The sweep as JSON values; the values of recipes are those that the runs have, and not as typed."""
    from fiddlehead.runs.export import json_value
    from fiddlehead.runs.record import recipe_values

    runs = {run.name: run for run in found.runs()}
    listed = [
        {
            "run": variant.name,
            "state": status.state if status else None,
            "edits": variant.values,
            metric: json_value(value),
            "recipe": json_value(recipe_values(runs[variant.name].recipe, [])),
        }
        for variant, status, value in rows
    ]
    return {"name": found.name, "metric": metric, "runs": listed}


def _coordinates(rows: Sequence[Row], metric: str) -> tuple[list[Any], list[str]]:
    """The axes of the picture, and the names of the runs."""
    from fiddlehead.runs.parallel import coordinate

    paths = list(rows[0][0].values)
    axes = [coordinate(path, [variant.values[path] for variant, _, _ in rows]) for path in paths]
    axes.append(coordinate(metric, [value for _, _, value in rows]))
    return axes, [variant.name for variant, _, _ in rows]


def _page(found: Sweep, rows: Sequence[Row], metric: str, best: int) -> str:
    """The page of a sweep: the picture, the curves of the best runs, and the table."""
    from html import escape

    from fiddlehead.runs import parallel
    from fiddlehead.runs.charts import figure
    from fiddlehead.runs.curves import charts
    from fiddlehead.runs.page import page
    from fiddlehead.runs.page import table as html_table
    from fiddlehead.runs.record import read_run

    runs = {run.name: run for run in found.runs()}
    records = [read_run(runs[variant.name]) for variant, _, value in rows[:best] if value is not None]
    drawn = "".join(map(figure, charts(records, [metric]))) if records else ""
    cells = [
        [
            variant.name,
            status.state if status else "",
            *variant.values.values(),
            "" if value is None else f"{value:.6g}",
        ]
        for variant, status, value in rows
    ]
    axes, names = _coordinates(rows, metric)
    body = (
        f"<h1>{escape(found.name)}</h1><div class=charts>{parallel.svg(axes, names, best)}{drawn}</div>"
        f"<h2>Runs</h2>{html_table(['run', 'state', *rows[0][0].values, metric], cells)}"
    )
    return page(found.name, body)
