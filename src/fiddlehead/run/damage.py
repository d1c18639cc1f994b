"""Finds the damaged files of a run, and says what to do about each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import filled
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.prediction import Prediction

_ADVICE = {
    "recipe.yaml": "write the run's recipe there again: `fiddlehead pretrain --factory RECIPE ... --to-yaml` makes it",
    "metrics.csv": "repair it, or move it away to begin a new one",
    "resumed_from": "write the value of `resume` into it, or delete it and leave out `resume`",
    "wandb_id": "write the run's id in W&B into it, or delete it to begin another run there",
    "mlflow_id": "write the run's id in MLflow into it, or delete it to begin another run there",
}
"""The text files that a run needs to go on, besides its status, and what to do if one is damaged."""
_REPLACED: tuple[str, ...] = (
    "executor.json",
    "environment.json",
    "sources.json",
    "attention.json",
    "plan.json",
    "command",
    "job_id",
    "stop",
)
"""The files that the next attempt rewrites or extends."""


def find(run: RunDirectory) -> list[Problem]:
    """The damaged files of a run, each with what to do."""
    return [*in_the_way(run), *_damaged(run, dict.fromkeys(_REPLACED, "the next attempt replaces it"))]


def in_the_way(run: RunDirectory) -> list[Problem]:
    """As `find`, but only the files without which the run cannot go on."""
    found: list[Problem] = []
    try:
        run.written_status()
    except ConfigError as error:
        found += error.problems
    return [*found, *_damaged(run, _ADVICE)]


def _damaged(run: RunDirectory, advice: Mapping[str, str]) -> list[Problem]:
    return [
        Problem.in_file(run.path / name, f"is damaged: {reason}; {what_to_do}")
        for name, what_to_do in advice.items()
        if (reason := _reason(run, name))
    ]


def _not_a_prediction(values: Any) -> str:
    try:
        filled(Prediction, values)
    except ValueError as error:
        return str(error)
    return ""


def _reason(run: RunDirectory, name: str) -> str:
    """Why a file cannot be read; "" if it can, or if there is no such file."""
    file = run.path / name
    try:
        text = file.read_text(encoding="utf-8")
        if name == "metrics.csv":
            return "; ".join(f"{metric}={value!r} is not a number" for metric, value in run.spoiled_metrics().items())
        if name.endswith(".json"):
            if not isinstance(values := json.loads(text), (dict, list)):
                return "is not a JSON object"
            return _not_a_prediction(values) if name == "plan.json" else ""
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except UnicodeDecodeError as error:
        return f"is not valid UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return f"is not valid JSON: {error}"
    except RecursionError:
        return "is not JSON that can be read: nested too deep"
    return ""
