"""The logs of a run: a file for each process, and in each file the output of every attempt."""

from __future__ import annotations

import codecs
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory

BLOCK = 1 << 20
"""Bytes of a log that are in memory at a time: it may have gigabytes."""
_STARTED = re.compile(rb"=== started (\S+) on .* \((?:rank \d+ of \d+(?:, )?)?(.*)\)")
"""An attempt's first line in a log: when it began, and as which job."""


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
    count = len(attempts_in(run.log))
    if attempt.isdigit() and not 1 <= int(attempt) <= max(count, 1):
        raise ConfigError(f"--attempt {attempt}: {run.log} has {count}")
    printed = False
    for prefix, file in files.items():
        start, end = (0, None) if attempt == "all" else span(run, file, int(attempt or count))
        printed |= Printer(file, start, out or sys.stdout, prefix).show(end, whole_lines=False)
    return printed


@dataclass(frozen=True)
class Start:
    """The beginning of an attempt in a log."""

    position: int
    time: datetime
    job: str
    """The number of the job and of its restart, for a queued job."""


def attempts_in(file: Path) -> list[Start]:
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
                found.append(Start(position, began, job if "slurm job" in job else ""))
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


def span(run: RunDirectory, file: Path, number: int) -> tuple[int, int]:
    """The first and last byte of attempt `number` in a log, counted as in the run's log."""
    attempts, starts = attempts_in(run.log), attempts_in(file)
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


class Printer:
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
