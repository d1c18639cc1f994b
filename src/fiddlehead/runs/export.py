"""Writes runs for other programs: JSON with numbers as numbers, CSV, and a page of HTML."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, TextIO

from fiddlehead import numbers
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.atomic import write_atomically
from fiddlehead.run.history import Axis
from fiddlehead.runs.charts import figure
from fiddlehead.runs.compare import Result, differences, results, show_value
from fiddlehead.runs.curves import Chart, short, unique_names
from fiddlehead.runs.page import page, table
from fiddlehead.runs.record import Record


def to_json(records: Sequence[Record], charts: Sequence[Chart]) -> dict[str, Any]:
    """Runs with their recipes, results and curves, and what they differ in; null is a number that is not finite."""
    found = results([record.history for record in records])
    names = unique_names(records)
    runs = [
        {
            "name": name,
            "path": str(record.path),
            "recipe": json_value(record.recipe),
            "metrics": {
                metric: _result(each[number]) for metric, each in found.items() if each[number].final is not None
            },
            "curves": {
                chart.title: {"axis": chart.x_label, "x": json_value(curve.xs), "y": json_value(curve.ys)}
                for chart in charts
                for curve in chart.curves
                if curve.name == name
            },
            "problems": record.problems,
        }
        for number, (name, record) in enumerate(zip(names, records, strict=True))
    ]
    listed = [
        {"section": each.section, "path": each.path, "values": json_value(each.values)} for each in differences(records)
    ]
    return {"runs": runs, "differences": listed}


def json_value(value: Any) -> Any:
    """A value as JSON: numbers stay numbers, and one that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def write_csv(records: Sequence[Record], out: TextIO, axis: Axis = "step") -> None:
    """Writes a row for each logged step of each run: `run`, `step`, the axis, and every metric as it was logged."""
    metrics = list(dict.fromkeys(name for record in records for name in record.history.columns))
    extra = [axis] if axis == "hours" else []
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "step", *extra, *metrics])
    for name, record in zip(unique_names(records), records, strict=True):
        history = record.history
        hours = history.along(axis, history.steps)
        for row, step in enumerate(history.steps):
            values = [history.columns[metric][row] if metric in history.columns else None for metric in metrics]
            cells = ["" if value is None else value for value in values]
            writer.writerow([name, step, *([hours[row]] if extra else []), *cells])


def comparison_page(records: Sequence[Record], charts: Sequence[Chart]) -> str:
    """The comparison of runs as one HTML file."""
    names = unique_names(records)
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
    body = [f"<h1>{escape(title)}</h1><div class=charts>{''.join(figure(chart) for chart in charts)}</div>"]
    body.append("<h2>Results</h2>" + (table(["metric", *names], result_rows(records)) or "<p>no metrics yet</p>"))
    found = differences(records)
    for section in dict.fromkeys(each.section for each in found):
        rows = [[each.path, *map(show_value, each.values)] for each in found if each.section == section]
        body.append(f"<h2>Differences: {section}</h2>{table(['', *names], rows)}")
    problems = [problem for record in records for problem in record.problems]
    if problems:
        body.append("<h2>Problems</h2>" + "".join(f"<p class=bad>{escape(problem)}</p>" for problem in problems))
    return page(title, "".join(body))


def result_rows(records: Sequence[Record]) -> Iterator[list[str]]:
    """A row for each metric: its name, and for each run the final value and the best one."""
    for metric, found in results([record.history for record in records]).items():
        yield [metric, *map(show_result, found)]


def show_result(result: Result) -> str:
    """The final value; if another one was better, that too, with its step."""
    if result.final is None:
        return ""
    final = numbers.figure(result.final)
    if result.best is None or result.best == result.final:
        return final
    return f"{final} (best {numbers.figure(result.best)} at step {short(result.best_step or 0)})"


def write(option: str, file: Path, text: str) -> None:
    """Writes a file that the user has named with an option.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_atomically(file, text)
    except OSError as error:
        raise ConfigError(Problem(option, str(file), f"cannot be written: {error.strerror}")) from error


def _result(result: Result) -> dict[str, Any]:
    return {"final": json_value(result.final), "best": json_value(result.best), "best_step": result.best_step}
