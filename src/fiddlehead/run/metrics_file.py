"""The newest values in a run's `metrics.csv`, which may be large, cut short or spoiled."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

MAX_METRICS_READ = 2**20
"""The bytes at the end of `metrics.csv` that are read for its newest values: about eight thousand rows."""


def last_values(file: Path) -> dict[str, str]:
    """The newest value of each metric, as text; empty before the first.

    Of a large file the end is read, so a metric that was not logged for thousands of steps is left out; so is one of
    `spoiled_values`.
    """
    return {name: value for name, value in _newest_values(file).items() if _is_number(value)}


def spoiled_values(file: Path) -> dict[str, str]:
    """The newest values in the file that are not numbers."""
    return {name: value for name, value in _newest_values(file).items() if not _is_number(value)}


def last_step(file: Path) -> int:
    """The newest step; 0 before the first."""
    _, rows = _newest_rows(file)
    return next((int(row[0]) for row in rows if row and row[0].isdecimal() and len(row[0]) < 20), 0)


def _newest_values(file: Path) -> dict[str, str]:
    latest: dict[str, str] = {}
    header, rows = _newest_rows(file)
    for row in rows:
        for name, value in zip(header, row, strict=False):
            if value:
                latest.setdefault(name, value)
        if len(latest) == len(header):
            break
    return {name: latest[name] for name in header if name in latest}


def _newest_rows(file: Path) -> tuple[list[str], Iterator[list[str]]]:
    """The columns and the rows, the newest first, without a last one that is cut short."""
    try:
        with file.open("rb") as stream:
            first = stream.readline()
            start = max(stream.tell(), stream.seek(0, os.SEEK_END) - MAX_METRICS_READ)
            stream.seek(start)
            lines = stream.read().decode(errors="replace").replace("\0", "\ufffd").split("\n")
    except FileNotFoundError:
        return [], iter(())
    if start > len(first):
        del lines[0]  # its beginning was not read
    columns = next(_rows([first.decode(errors="replace").replace("\0", "\ufffd")]), [])
    return columns, _rows(lines[-2::-1])


def _rows(lines: list[str]) -> Iterator[list[str]]:
    """The rows of CSV, each on a line; a line that is not CSV is a row with one cell."""
    for line in lines:
        try:
            yield from csv.reader([line])
        except csv.Error:
            yield [line]


def _is_number(text: str) -> bool:
    """Whether a text is a number, infinity and NaN among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True
