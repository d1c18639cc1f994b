"""Watching runs on every executor: their states, their output, and how they end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TextIO

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.launch import secrets
from fiddlehead.launch.docker import DockerExecutor
from fiddlehead.launch.executor import Executor, where_process
from fiddlehead.launch.local import LocalExecutor
from fiddlehead.launch.logs import Printer, attempts_in, log_files, span
from fiddlehead.launch.nemo.handed import HandedExecutor
from fiddlehead.launch.slurm import SlurmExecutor
from fiddlehead.recipe import trust
from fiddlehead.recipe.allowed import locate, reference_to
from fiddlehead.run.alive import is_locked
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, StopRequest
from fiddlehead.run.terminal import shown_on

KINDS: dict[str, type[Executor]] = {
    kind.kind: kind for kind in (LocalExecutor, SlurmExecutor, DockerExecutor, HandedExecutor)
}
LOOK, ASK = 0.1, 3.0
"""Seconds between two looks at a log, and between two questions to an executor while there is something new."""
SELDOM = 30.0
"""Seconds between two questions to an executor when nothing has been new for long."""

_unreadable: set[Path] = set()
"""Unreadable files of settings for which a warning was printed."""


def load_executor(run: RunDirectory) -> Executor | None:
    """Loads the executor of a run; None if it ran in its launcher's own process.

    A user's own executor is imported only if this user launched the run.

    Raises:
        ConfigError: the saved executor is not valid.
    """
    try:
        settings = json.loads(run.executor.read_text())
        name, own = settings.pop("kind"), settings.pop("class", None)
        known_here = own is None or (name in KINDS and own == reference_to(KINDS[name]))
        kind = KINDS[name] if known_here else _own_kind(run, str(own))
        known = {field.name for field in fields(kind)}
        return kind(**{name: value for name, value in settings.items() if name in known})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "start the run again with its log.name and executor=..., which rewrites that file"
        raise ConfigError(Problem.in_file(run.executor, f"cannot be read: {error!r}; {advice}")) from error


def _own_kind(run: RunDirectory, name: str) -> type[Executor]:
    """The class of a user's own executor, ``module:name``."""
    if not trust.knows_executor(run):
        message = f"names {name}, which is not an executor of fiddlehead, and you did not send the run there"
        raise ConfigError(Problem.in_file(run.executor, message))
    kind = locate(name)
    if not (isinstance(kind, type) and issubclass(kind, Executor)):
        raise ConfigError(Problem.in_file(run.executor, f"{name} is not an executor"))
    return kind


def is_plain(run: RunDirectory) -> bool:
    """Whether a run ran on this machine with default settings: without commands and variables of its own."""
    executor = load_executor(run)
    if executor is None:
        return True
    return executor.is_plain


def where(run: RunDirectory, status: Status) -> str:
    """Where a run is, or was, in a few words."""
    kind = KINDS.get(status.executor)
    return kind.where(run, status) if kind else where_process(status)


def states(runs: Sequence[RunDirectory]) -> list[Status | None]:
    """The state of each run; every executor is asked once for all its runs.

    If the executor does not answer, this warns, and the run's own status counts. A status that cannot be read is
    DAMAGED.
    """
    found: dict[Path, Status | None] = {}
    groups: dict[str, tuple[Executor, list[RunDirectory]]] = {}
    for run in runs:
        try:
            executor, status = _known_executor(run), run.written_status()
        except ConfigError as error:
            found[run.path] = Status(State.DAMAGED, reason=str(error))
            continue
        if executor is None or status is None or not executor.sent(status):
            found[run.path] = run.status()
        else:
            groups.setdefault(executor.queue(), (executor, []))[1].append(run)
    for executor, members in groups.values():
        for run, status in zip(members, executor.states(members), strict=True):
            found[run.path] = status
    return [found[run.path] for run in runs]


def follow(run: RunDirectory, *, start: int = 0, out: TextIO | None = None) -> Status | None:
    """Prints a run's log from the byte `start` on, until the run has ended; Ctrl-C cancels the run.

    It continues after requeues. While there is no output, it prints why the run waits.
    """
    with shown_on(out or sys.stdout) as shown:
        printer = Printer(run.log, start, shown)
        try:
            return _follow(run, printer)
        except KeyboardInterrupt:
            printer.say("cancelling: the step in hand is being saved (Ctrl-C again: at once)")
            try:
                status = cancel(run, printer=printer)
            except KeyboardInterrupt:
                status = kill(run)
            printer.show()
            return status


def print_logs(run: RunDirectory, rank: str = "0", out: TextIO | None = None) -> None:
    """Prints the newest attempt of a run, and its further output until the run has ended."""
    with shown_on(out or sys.stdout) as shown:
        _print_logs(run, rank, shown)


def _print_logs(run: RunDirectory, rank: str, out: TextIO) -> None:
    printers: dict[str, Printer] = {}
    while True:
        (status,) = states([run])  # before the logs are read, so that the last lines are not missed
        deadline = time.monotonic() + ASK
        while True:
            files = {"": run.log} if rank == "0" else log_files(run, rank)
            for prefix, file in files.items():
                if prefix not in printers:
                    start, _ = span(run, file, len(attempts_in(run.log)))
                    printers[prefix] = Printer(file, start, out, prefix)
                printers[prefix].show()
            written = run.written_status()
            if time.monotonic() > deadline or written is None or written.state.ended:
                break
            time.sleep(LOOK)
        if status is None or status.state.ended:
            return


def ask_to_stop(run: RunDirectory) -> None:
    """Asks a run on any machine to save its step and end, without waiting."""
    run.request_stop(StopRequest("cancelled by the user"))


def cancel(run: RunDirectory, patience: float = 60.0, *, printer: Printer | None = None) -> Status | None:
    """Asks a run to save its step and end; kills it after `patience` seconds, or at once if it has not begun."""
    (status,) = states([run])
    if status is None or status.state.ended:
        return status
    ask_to_stop(run)
    executor = load_executor(run)
    if status.state is not State.RUNNING and executor is not None and not executor.begins_at_once:
        return kill(run)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if printer:
            printer.show()
        (status,) = states([run])
        if status is None or status.state.ended:
            return status
        time.sleep(0.3)
    return kill(run)


def write_off(run: RunDirectory) -> Status | None:
    """Marks a run as dead if its machine is gone or cannot be asked.

    Raises:
        ConfigError: a process still holds the run's lock, so it is alive.
    """
    status = run.written_status()
    if is_locked(run.lock):
        raise ConfigError(f"run {run.name!r} still has a process, which holds {run.lock}; cancel it without --force")
    if status is not None and not status.state.ended:
        reason = f"written off, as process {status.pid} on {status.host} is gone"
        status = replace(status, state=State.DIED, ended=time.time(), reason=reason)
        run.write_status(status)
    secrets.remove(run)
    return status


def wait(run: RunDirectory) -> Status | None:
    """Waits until a run has ended, and returns its state."""
    while True:
        (status,) = states([run])
        if status is None or status.state.ended:
            return status
        time.sleep(ASK)


def kill(run: RunDirectory) -> Status | None:
    """Ends a run's job at once and marks the run as cancelled."""
    executor = load_executor(run) or LocalExecutor()
    executor.kill(run)
    status = run.written_status()
    if status is not None and not status.state.ended:
        status = replace(status, state=State.CANCELLED, ended=time.time(), reason="killed; its checkpoints are whole")
        run.write_status(status)
    return status


def _known_executor(run: RunDirectory) -> Executor | None:
    """The executor of a run; None, with one warning, if the saved executor is not valid."""
    try:
        return load_executor(run)
    except ConfigError as error:
        if run.executor not in _unreadable:
            print(f"WARNING: of {run.name} only its own word is known: {error}", file=sys.stderr)  # noqa: T201
        _unreadable.add(run.executor)
        return None


def _follow(run: RunDirectory, printer: Printer) -> Status | None:
    waiting, news, ask_at = "", time.monotonic(), 0.0
    while True:
        written = run.written_status()
        if time.monotonic() > ask_at or (written is not None and written.state.ended):
            (status,) = states([run])  # before the log is read, so that the last lines are not missed
            printer.show()
            if status is None or status.state.ended:
                return status
            now = f"{status.state}: {status.reason}" if status.state is State.PENDING and status.reason else ""
            if now and now != waiting:
                printer.say(now)
            waiting = now
            ask_at = time.monotonic() + min(max(ASK, (time.monotonic() - news) / 10), SELDOM)
        if printer.show():
            news = time.monotonic()
        time.sleep(LOOK)
