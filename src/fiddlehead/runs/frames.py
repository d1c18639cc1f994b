"""Metrics of several runs as pandas frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path
from fiddlehead.run.frame import frame as frame_of
from fiddlehead.run.frame import load_pandas
from fiddlehead.runs.record import Record, open_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas  # pyright: ignore[reportMissingImports]  # an optional extra


def frame(runs: str | Sequence[str] = "runs/*") -> pandas.DataFrame:
    """All logged metrics of runs: a row for each logged step, with the run's name in the column `run`.

    Args:
        runs: a pattern of folders, or names or folders of runs. Folders without a recipe are passed over if a pattern
            finds them.

    Raises:
        ConfigError: pandas is not installed, or there is no such run.
    """
    pandas, parts = load_pandas(), []
    for record in records(runs):
        part = frame_of(record.history)
        part.insert(0, "run", record.name)
        parts.append(part)
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame({"run": [], "step": []})


def summary(runs: str | Sequence[str] = "runs/*") -> pandas.DataFrame:
    """A row for each run: its last metrics, `best.NAME` of its losses, and the values of its recipe by path.

    Raises:
        ConfigError: as `frame`.
    """
    return load_pandas().DataFrame([summary_row(record) for record in records(runs)])


def summary_row(record: Record) -> dict[str, Any]:
    """The name, the last metrics, the best losses and the recipe of a run, in one flat mapping."""
    history = record.history
    last = {name: history.last(name) for name in history.columns}
    best = {f"best.{name}": found[1] for name in ("loss", "val_loss") if (found := history.best(name))}
    step = {"step": history.steps[-1]} if history.steps else {}
    return {"run": record.name, **step, **last, **best, **record.recipe}


def records(runs: str | Sequence[str]) -> list[Record]:
    """The records of runs, as `frame` names them.

    Raises:
        ConfigError: there is no such run, or a pattern finds none.
    """
    if isinstance(runs, str) and any(sign in runs for sign in "*?["):
        pattern = user_path(runs).absolute()
        found = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
        folders = sorted(folder for folder in found if _is_run(folder))
        if not folders:
            raise ConfigError(Problem("runs", runs, "no run directory has such a path"))
        return [open_record(str(folder)) for folder in folders]
    return [open_record(name) for name in ([runs] if isinstance(runs, str) else runs)]


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or bool(list(folder.glob("run-*.wandb")))
