"""The rows of `metrics.csv`, and the logging of a row everywhere."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.atomic import write_atomically
from fiddlehead.run.console import is_rank_zero
from fiddlehead.run.metric_names import grouped


def log_row(loggers: Sequence[Logger], metrics: dict[str, float], step: int) -> None:
    """Logs the metrics of a step: in columns of `metrics.csv`, and by their names in groups everywhere else."""
    for logger in loggers:
        logger.log_metrics(metrics if isinstance(logger, MetricsCSV) else grouped(metrics), step)


class MetricsCSV(Logger):
    """One row for each logged step; a new metric gets a new column.

    It drops rows after `resumed_step`, which a killed attempt may have left, so the file is the same as for an
    uninterrupted run. Floats keep their exact values.
    """

    FIRST_COLUMNS = ("step", "loss", "val_loss", "val_nats_per_byte", "lr", "grad_norm", "tokens", "tokens_per_s")

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns = list(self.FIRST_COLUMNS)
        if is_rank_zero():
            self._rewrite(resumed_step)

    @property
    def name(self) -> str:
        """The folder of the file."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Empty: each run has only one version."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the recipe is in the same folder."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row, in one write."""
        row = {"step": step} | {key: value for key, value in metrics.items() if key != "epoch"}
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._rewrite(None)
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(row)
        with self.path.open("a") as file:
            file.write(text.getvalue())

    def _rewrite(self, last_step: int | None) -> None:
        """Rewrites the file with the present columns and the rows up to `last_step` (None: all)."""
        rows: list[dict[str, str]] = []
        if self.path.exists():
            text, _, _cut_short = self._text().rpartition("\n")  # by a crash in the middle of a write
            reader = csv.DictReader(io.StringIO(text))
            rows = [row for row in reader if last_step is None or _is_up_to(row, last_step)]
            self._columns += [name for name in reader.fieldnames or () if name not in self._columns]
        table = io.StringIO()
        writer = csv.DictWriter(table, self._columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, table.getvalue())

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            message = f"is not valid UTF-8 at byte {error.start}; repair it, or move it away to begin a new one"
            raise ConfigError(Problem.in_file(self.path, message)) from error


def _is_up_to(row: dict[str, str], last_step: int) -> bool:
    """Whether a row's step is at most `last_step`."""
    return (row.get("step") or "").isdecimal() and int(row["step"]) <= last_step
