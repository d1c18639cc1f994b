"""What is wrong with the files of a run that a crash, a full disk or a hand has spoiled, and what to do about each."""

from __future__ import annotations

import json

from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory

_ADVICE = {
    "recipe.yaml": "write the run's recipe there again: `fiddlehead pretrain --factory RECIPE ... --to-yaml` makes it",
    "metrics.csv": "mend it, or move it away: the run goes on, and its metrics begin anew",
    "resumed_from": "write into it what `resume` was, or delete it and leave out `resume`",
    "wandb_id": "write into it the id that the run has in W&B, or delete it to begin another run there",
}
"""The text files that a run goes on from, beside its status, and what to do where one is damaged."""
_REPLACED = ("executor.json", "environment.json", "attention.json", "command", "job_id", "stop")
"""Those that are written anew, or added to, when it is started again."""


def find(run: RunDirectory) -> list[str]:
    """What is wrong with the files of a run: a sentence for each, with what to do; empty if nothing is."""
    replaced = [f"{run.path / name} is damaged: {reason}" for name in _REPLACED if (reason := _reason(run, name))]
    return [*in_the_way(run), *(f"{problem}; the next attempt replaces it" for problem in replaced)]


def in_the_way(run: RunDirectory) -> list[str]:
    """As `find`, of the files without which the run cannot go on."""
    found: list[str] = []
    try:
        run.written_status()
    except ConfigError as error:
        found += error.problems
    for name, advice in _ADVICE.items():
        if reason := _reason(run, name):
            found.append(f"{run.path / name} is damaged: {reason}; {advice}")
    return found


def _reason(run: RunDirectory, name: str) -> str:
    """Why a file cannot be read; "" if it can, or is not there."""
    file = run.path / name
    try:
        text = file.read_text(encoding="utf-8")
        if name == "metrics.csv":
            return "; ".join(f"{metric}={value!r} is not a number" for metric, value in run.spoiled_metrics().items())
        if name.endswith(".json") and not isinstance(json.loads(text), (dict, list)):
            return "is not a JSON object"
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
