"""Sweeps: many runs of one recipe that differ in their edits, and a table of their results."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.paths import user_path
from fiddlehead.launch import Plan, watch
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.submit import hand_over
from fiddlehead.recipe.literals import split_arguments
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.history import better
from fiddlehead.run.status import State, Status

LOOK = 1.0
"""Seconds between two checks of active runs."""


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    name: str
    values: dict[str, str]
    """The differing values by path, as typed."""

    def edits(self, typed: Sequence[str]) -> list[str]:
        """The sweep's edits in their order, with this run's value for each edit that has several."""
        paths = [edit.partition("=")[0] for edit in typed]
        return [
            f"{path}={self.values[path]}" if path in self.values else edit
            for path, edit in zip(paths, typed, strict=True)
        ]


@dataclass(frozen=True)
class Sweep:
    """A set of runs, saved in `NAME.sweep.json` beside their folders."""

    name: str
    directory: str
    variants: list[Variant]

    def runs(self) -> list[RunDirectory]:
        """The directories of the runs, in order."""
        return [RunDirectory(user_path(self.directory).absolute() / variant.name) for variant in self.variants]

    def save(self) -> None:
        """Writes the sweep to its file.

        Raises:
            ConfigError: another sweep has this name.
        """
        file = user_path(self.directory) / f"{self.name}.sweep.json"
        if file.exists() and load(self.name, self.directory) != self:
            raise ConfigError(Problem("log.name", self.name, f"is another sweep, {file}; choose another name"))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(self), indent=1) + "\n")


def load(name: str, directory: str | Path = "runs") -> Sweep:
    """Loads the sweep `name`.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = json.loads((user_path(directory) / f"{name}.sweep.json").read_text())
        variants = [Variant(**variant) for variant in found["variants"]]
        return Sweep(found["name"], str(directory), variants)
    except FileNotFoundError:
        names = sorted(file.name.removesuffix(".sweep.json") for file in user_path(directory).glob("*.sweep.json"))
        raise ConfigError(Problem("", name, f"unknown sweep {name!r} in {directory}/", names)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"cannot be read: {error!r}; `fiddlehead runs` lists the sweep's runs"
        raise ConfigError(Problem.in_file(f"{directory}/{name}.sweep.json", message)) from error


def expand(edits: Sequence[str], name: str, *, zipped: bool = False) -> list[Variant]:
    """Expands edits with several values into runs: `optim.lr=1e-3,3e-4`.

    Args:
        edits: as typed; commas in brackets or quotes do not separate values.
        name: the prefix of the runs' names.
        zipped: pair the first values, the second values, and so on; otherwise every combination makes a run.

    Raises:
        ConfigError: no edit has several values, an edit that cannot have several has them, or zipped edits have
            different numbers of values.
    """
    several: dict[str, list[str]] = {}
    for edit in edits:
        path, values = edit.partition("=")[0], values_of(edit)
        if len(values) < 2:
            continue
        if path in ("log.name", "log.dir"):
            raise ConfigError(f"{edit}: a sweep names its runs and keeps them in one folder; give one value")
        if path[-1:] in "+-*/":
            raise ConfigError(f"{edit}: a sweep sets values; give them as {path[:-1]}=...,...")
        if path in several:
            raise ConfigError(f"{edit}: {path} has several values already")
        several[path] = values
    if not several:
        raise ConfigError("--sweep: no edit has several values, as optim.lr=1e-3,3e-4 has")
    if zipped and len({len(values) for values in several.values()}) > 1:
        counts = ", ".join(f"{path} has {len(values)}" for path, values in several.items())
        raise ConfigError(f"--zip: the values go together one by one, but {counts}")
    combinations = zip(*several.values(), strict=True) if zipped else itertools.product(*several.values())
    made = [dict(zip(several, values, strict=True)) for values in combinations]
    return [Variant(folder, values) for folder, values in zip(_names(name, made), made, strict=True)]


def values_of(edit: str) -> list[str]:
    """The values of an edit; commas in brackets or quotes do not separate values."""
    return split_arguments(edit.partition("=")[2])


def _names(base: str, made: Sequence[dict[str, str]]) -> Iterator[str]:
    """Distinct folder names for the runs; they contain the values if these are short enough."""
    seen: set[str] = set()
    for number, values in enumerate(made, start=1):
        words = "-".join(f"{path.split('.')[-1]}={value}" for path, value in values.items())
        name = f"{base}-{re.sub(r'[^A-Za-z0-9_.=+-]+', '_', words)}"
        if len(name) > 100 or name in seen:
            name = f"{base}-{number}"
        seen.add(name)
        yield name


def run_all(
    sweep: Sweep,
    plans: Sequence[Plan],
    executor: Executor,
    *,
    max_running: int | None = None,
    allow: Sequence[str] = (),
    despite: Sequence[str] = (),
    command: str | None = None,
    report: Callable[[list[Status | None]], None] | None = None,
) -> list[Status | None]:
    """Runs a sweep to its end and returns the state of each run; Ctrl-C cancels all runs.

    Args:
        plans: one for each run, with its name, all for the same executor.
        despite: as in `Plan.submit`.
        max_running: the most runs at a time; None means all.
        report: is called with the states whenever they may have changed; None: return when all jobs are submitted.

    Raises:
        ConfigError: a plan has problems or is refused, and nothing was started; or a run cannot be submitted, and the
            runs before it are cancelled.
    """
    for each in plans:
        each.refuse_problems()
        each.refuse_unfit(despite)
    sweep.save()
    runs = sweep.runs()
    waiting = list(zip(plans, runs, strict=True))
    begun: list[RunDirectory] = []
    with contextlib.ExitStack() as held:
        try:
            while True:
                statuses = watch.states(begun)
                going = sum(status is not None and not status.state.ended for status in statuses)
                while waiting and (executor.queues or max_running is None or going < max_running):
                    made, run = waiting.pop(0)
                    # If the executor queues jobs, each waits for the job whose place it takes, and the launcher can
                    # end.
                    place = len(begun) - (max_running or len(runs))
                    before = [begun[place]] if executor.queues and place >= 0 else []
                    lifetime = held if report else None
                    hand_over(
                        made.recipe,
                        made.executor or executor,
                        made.prediction(despite),
                        lifetime,
                        allow=allow,
                        command=command,
                        after_any=before,
                    )
                    begun.append(run)
                    going += 1
                if report is None:
                    return watch.states(runs)
                statuses = watch.states(begun)
                report([*statuses, *(None for _ in waiting)])
                if not waiting and all(status is None or status.state.ended for status in statuses):
                    return statuses
                time.sleep(LOOK)
        except BaseException:
            _cancel_all(begun)
            raise


def results(sweep: Sweep, metric: str) -> list[tuple[Variant, Status | None, float | None]]:
    """The runs, their states and newest value of `metric`: the best first, then NaNs, then missing values.

    The best is the lowest, or the highest of a metric like `tokens_per_s` (`history.better`).
    """
    statuses = watch.states(sweep.runs())
    rows = []
    for variant, run, status in zip(sweep.variants, sweep.runs(), statuses, strict=True):
        value = run.last_metrics().get(metric)
        rows.append((variant, status, float(value) if value else None))
    sign = -1 if better(metric) == "higher" else 1

    def place(row: tuple[Variant, Status | None, float | None]) -> tuple[int, float]:
        value = row[2]
        if value is None:
            return 2, 0.0
        return (1, 0.0) if math.isnan(value) else (0, sign * value)

    return sorted(rows, key=place)


def metric_of(sweep: Sweep, metric: str = "") -> str:
    """The metric to sort by: `metric`, or else `val_loss` if a run has it, or else `loss`.

    Raises:
        ConfigError: the runs have metrics, and `metric` is not one of them.
    """
    known = sorted({name for run in sweep.runs() for name in run.last_metrics()})
    if metric and known and metric not in known:
        raise ConfigError(f"--metric: {Problem.unknown('', metric, 'metric', known)}")
    return metric or ("val_loss" if "val_loss" in known else "loss")


def failed(sweep: Sweep, statuses: Sequence[Status | None]) -> list[str]:
    """The names of the runs that did not succeed."""
    return [
        variant.name
        for variant, status in zip(sweep.variants, statuses, strict=True)
        if status is None or status.state is not State.SUCCEEDED
    ]


def _cancel_all(runs: Sequence[RunDirectory]) -> None:
    """Cancels all runs that have not ended, at the same time; another Ctrl-C kills them."""
    going = [run for run, status in zip(runs, watch.states(runs), strict=True) if status and not status.state.ended]
    try:
        for run in going:
            watch.ask_to_stop(run)
        for run in going:
            watch.cancel(run)
    except KeyboardInterrupt:
        for run in going:
            watch.kill(run)
