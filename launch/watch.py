"""Watching runs on every executor: their states, their output, and how they end."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TextIO

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.launch import secrets
from fiddlehead.launch.docker import DockerExecutor
from fiddlehead.launch.executor import Executor, where_process
from fiddlehead.launch.local import LocalExecutor
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
BLOCK = 1 << 20
"""Bytes of a log that are in memory at a time: it may have gigabytes."""
SELDOM = 30.0
"""Seconds between two questions to an executor when nothing has been new for long."""

_STARTED = re.compile(rb"=== started (\S+) on .* \((?:rank \d+ of \d+(?:, )?)?(.*)\)")
"""An attempt's first line in a log: when it began, and as which job."""
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
        printer = _Printer(run.log, start, shown)
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
    """The logs of a run's processes, by the prefix of their lines; `rank` is a number or "all".

    Raises:
        ConfigError: there is no such process.
    """
    if rank == "0":
        return {"": run.log}
    numbered = [file for file in run.logs.glob("*.txt") if re.fullmatch(r"(rank|node)-\d+", file.stem)]
    others = sorted(numbered, key=lambda file: (file.stem.split("-")[0], int(file.stem.split("-")[1])))
    if rank == "all":
        return {"[rank 0] ": run.log, **{f"[{file.stem.replace('-', ' ')}] ": file for file in others}}
    file = run.logs / f"rank-{rank}.txt"
    if not file.exists():
        ranks = ["0", *(file.stem.removeprefix("rank-") for file in others if file.stem.startswith("rank-"))]
        raise ConfigError(f"--rank {rank}: run {run.name!r} has logs of {', '.join(ranks)}")
    return {"": file}


def print_attempt(run: RunDirectory, files: Mapping[str, Path], attempt: str = "", out: TextIO | None = None) -> bool:
    """Prints the output of an attempt: a number, "all", or "" for the newest; returns whether there was any.

    Raises:
        ConfigError: there was no such attempt.
    """
    count = len(_starts(run.log))
    if attempt.isdigit() and not 1 <= int(attempt) <= max(count, 1):
        raise ConfigError(f"--attempt {attempt}: {run.log} has {count}")
    printed = False
    for prefix, file in files.items():
        start, end = (0, None) if attempt == "all" else _span(run, file, int(attempt or count))
        printed |= _Printer(file, start, out or sys.stdout, prefix).show(end, whole_lines=False)
    return printed


def print_logs(run: RunDirectory, rank: str = "0", out: TextIO | None = None) -> None:
    """Prints the newest attempt of a run, and its further output until the run has ended."""
    with shown_on(out or sys.stdout) as shown:
        _print_logs(run, rank, shown)


def _print_logs(run: RunDirectory, rank: str, out: TextIO) -> None:
    printers: dict[str, _Printer] = {}
    while True:
        (status,) = states([run])  # before the logs are read, so that the last lines are not missed
        deadline = time.monotonic() + ASK
        while True:
            files = {"": run.log} if rank == "0" else log_files(run, rank)
            for prefix, file in files.items():
                if prefix not in printers:
                    start, _ = _span(run, file, len(_starts(run.log)))
                    printers[prefix] = _Printer(file, start, out, prefix)
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


def cancel(run: RunDirectory, patience: float = 60.0, *, printer: _Printer | None = None) -> Status | None:
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


def _follow(run: RunDirectory, printer: _Printer) -> Status | None:
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


@dataclass(frozen=True)
class _Start:
    """The beginning of an attempt in a log."""

    position: int
    time: datetime
    job: str
    """The number of the job and of its restart, for a queued job."""


def _starts(file: Path) -> list[_Start]:
    """The beginnings of attempts in a log, which may be larger than memory."""
    found = []
    for position in _occurrences(file, b"=== started "):
        with file.open("rb") as stream:
            stream.seek(max(position - 1, 0))
            if position and stream.read(1) != b"\n":
                continue
            match = _STARTED.fullmatch(stream.readline(BLOCK).rstrip(b"\n"))
        if match:
            job = match[2].decode(errors="replace")
            with contextlib.suppress(ValueError):  # a line that only looks like one of ours
                began = datetime.fromisoformat(match[1].decode())
                found.append(_Start(position, began, job if "slurm job" in job else ""))
    return found


def _occurrences(file: Path, text: bytes) -> Iterator[int]:
    """The byte offsets of a text in a file; none if there is no file."""
    if not file.exists():
        return
    with file.open("rb") as stream:
        kept, position = b"", 0  # the end of what was read before, and where that begins
        while block := stream.read(BLOCK):
            content = kept + block
            at = content.find(text)
            while at >= 0:
                yield position + at
                at = content.find(text, at + 1)
            kept = content[-(len(text) - 1) :]
            position += len(content) - len(kept)


def _span(run: RunDirectory, file: Path, number: int) -> tuple[int, int]:
    """The first and last byte of attempt `number` in a log, counted as in the run's log."""
    attempts, starts = _starts(run.log), _starts(file)
    end = file.stat().st_size if file.exists() else 0
    if not attempts:  # it ran in its launcher's process
        return 0, end
    # A process may have missed an attempt. Clocks of nodes may differ, but those of a queue say which job they are of.
    numbers = [
        sum(1 for attempt in attempts if attempt.time <= start.time)
        if not start.job
        else next((count for count, attempt in enumerate(attempts, start=1) if attempt.job == start.job), 0)
        for start in starts
    ]
    ends = [start.position for start in starts[1:]] + [end]
    spans = [(start.position, end) for start, end, of in zip(starts, ends, numbers, strict=True) if of == number]
    return (spans[0][0], spans[-1][1]) if spans else (end, end)


class _Printer:
    """Copies new output of a log, each line with `prefix` in front."""

    def __init__(self, file: Path, start: int, out: TextIO, prefix: str = "") -> None:
        self.file, self.position, self.out, self.prefix = file, start, out, prefix
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # what is new may end within a character

    def show(self, end: int | None = None, *, whole_lines: bool = True) -> bool:
        """Prints new output up to the byte `end`, block by block; with a prefix, only whole lines."""
        if not self.file.exists():
            return False
        began, kept = self.position, b""
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            while new := stream.read(BLOCK if end is None else min(BLOCK, max(0, end - self.position - len(kept)))):
                kept += new
                cut = kept.rfind(b"\n") + 1 if self.prefix else len(kept)
                self._write(kept[:cut])
                kept = kept[cut:]
        if not whole_lines:
            self._write(kept)
        self.out.flush()
        return self.position > began

    def _write(self, content: bytes) -> None:
        self.position += len(content)
        text = self.decoder.decode(content)
        self.out.write("".join(self.prefix + line for line in text.splitlines(keepends=True)) if self.prefix else text)

    def say(self, message: str) -> None:
        """Prints a line of the launcher's own."""
        print(message, file=self.out, flush=True)
