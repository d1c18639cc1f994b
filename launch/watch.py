"""What becomes of runs, wherever they went: their states, their output as it comes, their end."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TextIO

from fiddlehead.errors import ConfigError
from fiddlehead.launch.docker import DockerExecutor
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.local import LocalExecutor
from fiddlehead.launch.slurm import SlurmExecutor
from fiddlehead.runs import RunDirectory, State, Status, StopRequest

KINDS: dict[str, type[Executor]] = {kind.kind: kind for kind in (LocalExecutor, SlurmExecutor, DockerExecutor)}
LOOK, ASK = 0.1, 3.0
"""Seconds between two looks at a log, and between two questions to an executor."""
STARTED = "=== started "
"""What an attempt's first line begins with."""


def load_executor(run: RunDirectory) -> Executor | None:
    """The executor that a run was sent to; None if it ran in its launcher's own process.

    Raises:
        ConfigError: what is written down is not understood.
    """
    try:
        settings = json.loads(run.executor.read_text())
        kind = KINDS[settings.pop("kind")]
        known = {field.name for field in fields(kind)}
        return kind(**{name: value for name, value in settings.items() if name in known})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run.executor} cannot be read: {error!r}") from error


def states(runs: Sequence[RunDirectory]) -> list[Status | None]:
    """What has become of each run; every executor is asked once for all that it has."""
    found: dict[Path, Status | None] = {}
    groups: dict[str, tuple[Executor, list[RunDirectory]]] = {}
    for run in runs:
        executor = load_executor(run)
        status = run.written_status()
        if executor is None or status is None or status.executor != executor.kind:
            found[run.path] = run.status()
        else:
            groups.setdefault(executor.queue(), (executor, []))[1].append(run)
    for executor, members in groups.values():
        for run, status in zip(members, executor.states(members), strict=True):
            found[run.path] = status
    return [found[run.path] for run in runs]


def follow(run: RunDirectory, *, start: int = 0, out: TextIO | None = None) -> Status | None:
    """Prints what a run's log gets after the byte `start`, until the run has ended; Ctrl-C cancels it.

    It goes on over requeues, and says while there is nothing to print what the run is waiting for.
    """
    printer = _Printer(run.log, start, out or sys.stdout)
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


def log_files(run: RunDirectory, rank: str = "0") -> dict[str, Path]:
    """The logs of a run's processes, with what each line of them begins with; `rank` is a number or "all".

    Raises:
        ConfigError: there is no such process.
    """
    if rank == "0":
        return {"": run.log}
    others = sorted(run.logs.glob("*.txt"), key=lambda file: (file.stem.split("-")[0], int(file.stem.split("-")[1])))
    if rank == "all":
        return {"[rank 0] ": run.log, **{f"[{file.stem.replace('-', ' ')}] ": file for file in others}}
    file = run.logs / f"rank-{rank}.txt"
    if not file.exists():
        ranks = ["0", *(file.stem.removeprefix("rank-") for file in others if file.stem.startswith("rank-"))]
        raise ConfigError(f"--rank {rank}: run {run.name!r} has logs of {', '.join(ranks)}")
    return {"": file}


def attempt_of(files: Mapping[str, Path], attempt: str = "") -> str:
    """What the processes printed in an attempt: a number, "all", or "" for the newest.

    Raises:
        ConfigError: there was no such attempt.
    """
    parts = []
    for prefix, file in files.items():
        text = file.read_text(errors="replace") if file.exists() else ""
        starts = [match.start() for match in re.finditer(rf"^{re.escape(STARTED)}", text, re.MULTILINE)]
        ends = [*starts[1:], len(text)]
        if attempt.isdigit() and not 1 <= int(attempt) <= len(starts):
            raise ConfigError(f"--attempt {attempt}: {file} has {len(starts)}")
        if starts and attempt != "all":
            index = int(attempt) - 1 if attempt else -1
            text = text[starts[index] : ends[index]]
        parts += [prefix + line for line in text.splitlines(keepends=True)]
    return "".join(parts)


def print_logs(run: RunDirectory, rank: str = "0", out: TextIO | None = None) -> None:
    """Prints the newest attempt of a run, and what follows, until the run has ended."""
    printers: dict[str, _Printer] = {}
    while True:
        (status,) = states([run])  # before the logs are read, so that the last lines are not missed
        deadline = time.monotonic() + ASK
        while True:
            files = {"": run.log} if rank == "0" else log_files(run, rank)
            for prefix, file in files.items():
                if prefix not in printers:
                    printers[prefix] = _Printer(file, newest_start(file), out or sys.stdout, prefix)
                printers[prefix].show()
            written = run.written_status()
            if time.monotonic() > deadline or written is None or written.state.ended:
                break
            time.sleep(LOOK)
        if status is None or status.state.ended:
            return


def newest_start(file: Path) -> int:
    """Where in a log the newest attempt begins, in bytes."""
    text = file.read_bytes() if file.exists() else b""
    return max(text.rfind(b"\n" + STARTED.encode()) + 1, 0)


def ask_to_stop(run: RunDirectory) -> None:
    """Asks a run, wherever it is, to save the step in hand and end; it does not wait for that."""
    run.request_stop(StopRequest("cancelled by the user"))


def cancel(run: RunDirectory, patience: float = 60.0, *, printer: _Printer | None = None) -> Status | None:
    """Asks a run to save its step and end, and kills it if it has not after `patience` seconds, or has not begun."""
    (status,) = states([run])
    if status is None or status.state.ended:
        return status
    ask_to_stop(run)
    executor = load_executor(run)
    if status.state is not State.RUNNING and executor is not None and status.executor != "local":
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


def wait(run: RunDirectory) -> Status | None:
    """Waits until a run has ended, and returns how."""
    while True:
        (status,) = states([run])
        if status is None or status.state.ended:
            return status
        time.sleep(ASK)


def kill(run: RunDirectory) -> Status | None:
    """Ends a run's job at once, and writes down that it was cancelled."""
    executor = load_executor(run) or LocalExecutor()
    executor.kill(run)
    status = run.written_status()
    if status is not None and not status.state.ended:
        status = replace(status, state=State.CANCELLED, ended=time.time(), reason="killed; its checkpoints are whole")
        run.write_status(status)
    return status


def _follow(run: RunDirectory, printer: _Printer) -> Status | None:
    asked, waiting = 0.0, ""
    while True:
        written = run.written_status()
        if time.monotonic() - asked > ASK or (written is not None and written.state.ended):
            (status,) = states([run])  # before the log is read, so that the last lines are not missed
            asked = time.monotonic()
            printer.show()
            if status is None or status.state.ended:
                return status
            now = f"{status.state}: {status.reason}" if status.state is State.PENDING and status.reason else ""
            if now and now != waiting:
                printer.say(now)
            waiting = now
        printer.show()
        time.sleep(LOOK)


class _Printer:
    """Copies what is appended to a log, each line with `prefix` in front."""

    def __init__(self, file: Path, start: int, out: TextIO, prefix: str = "") -> None:
        self.file, self.position, self.out, self.prefix = file, start, out, prefix

    def show(self) -> None:
        """Prints what is new; with a prefix, whole lines only."""
        if not self.file.exists():
            return
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            new = stream.read()
        if self.prefix:
            new = new[: new.rfind(b"\n") + 1]
        self.position += len(new)
        text = new.decode(errors="replace")
        self.out.write("".join(self.prefix + line for line in text.splitlines(keepends=True)) if self.prefix else text)
        self.out.flush()

    def say(self, message: str) -> None:
        """Prints a line of the launcher's own."""
        print(message, file=self.out, flush=True)
