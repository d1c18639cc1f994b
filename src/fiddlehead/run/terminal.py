"""A terminal that shows a run: one line of progress that changes, and above it what stays."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import TextIO

from fiddlehead.numbers import clock, scientific

LINES_OF_A_RUN = 20
"""About how many lines of progress stay."""
LESS = ("[", "|g|", "lr", "MFU")
"""What a line of progress leaves out, one after the other, where the terminal is too narrow: by how it begins."""

_PROGRESS = re.compile(r"step +(?P<step>\d+)/(?P<last>\d+) .*  left (?P<left>[\d:]+)")
_COLOURS = (
    (re.compile(r"(error|Traceback)\b"), "31"),
    (re.compile(r"WARNING\b"), "33"),
    (re.compile(r"(step +\d+  )?validation\b"), "32"),
    (re.compile(r"=== "), "2"),
)
"""Of lines that begin like this: an error, a warning, a result, and what is only said in passing."""


def progress_line(metrics: dict[str, float], step: int, max_steps: int) -> str:
    """One line of progress, with a bar, for log files; `Live` shows it on a terminal."""
    filled = round(20 * step / max_steps)
    mfu = f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
    return (
        f"step {step:>6}/{max_steps} [{'#' * filled}{'-' * (20 - filled)}]  loss {metrics['loss']:.4f}  "
        f"lr {scientific(metrics['lr'])}  |g| {metrics['grad_norm']:.2f}  {metrics['tokens_per_s']:,.0f} tok/s{mfu}  "
        f"left {clock((max_steps - step) * metrics['seconds_per_step'])}"
    )


@contextlib.contextmanager
def shown_on(stream: TextIO) -> Iterator[TextIO]:
    """`stream`; where it is a terminal that can rewrite a line, a `Live` on it."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield stream
        return
    live = Live(stream)
    try:
        yield live  # type: ignore[misc]
    finally:
        live.end()


class Live:
    """Writes the lines of a run's log on a terminal.

    A line of progress replaces the one before; about `LINES_OF_A_RUN` of them stay, and the last one before each other
    line. Between two of them, the time that is left runs. Errors, warnings and results have colours, unless NO_COLOR is
    set.
    """

    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal
        self.colours = not os.environ.get("NO_COLOR")
        self._unfinished = ""
        """The beginning of a line whose end was not written yet."""
        self._line: re.Match[str] | None = None
        """The line of progress that the terminal shows at present."""
        self._shown = ""
        """What the terminal shows of it."""
        self._since = 0.0
        self._kept = 0
        """The step of the newest line of progress that stays."""

    def write(self, text: str) -> int:
        """Writes whole lines; the beginning of one is kept until the rest comes."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            if match := _PROGRESS.fullmatch(line):
                self._progress(match)
            else:
                self._end_line()
                self.terminal.write(self._coloured(line) + "\n")
        return len(text)

    def flush(self) -> None:
        """Redraws the line of progress, with the time that is left by now."""
        if self._line is not None:
            self._draw(self._line)
        self.terminal.flush()

    def end(self) -> None:
        """Writes what is unfinished."""
        self._end_line()
        self.terminal.write(self._unfinished)
        self._unfinished = ""
        self.terminal.flush()

    def isatty(self) -> bool:
        """True."""
        return True

    def _progress(self, line: re.Match[str]) -> None:
        step, last = int(line["step"]), int(line["last"])
        if self._line is not None and int(self._line["step"]) - self._kept >= last / LINES_OF_A_RUN:
            self._end_line()
        self._line, self._since = line, time.monotonic()
        if step == last:
            self._end_line()

    def _end_line(self) -> None:
        """Lets the line of progress stay."""
        if self._line is None:
            return
        self._kept, self._since = int(self._line["step"]), time.monotonic()
        self._draw(self._line)
        self.terminal.write("\n")
        self._line, self._shown = None, ""

    def _draw(self, line: re.Match[str]) -> None:
        shown = self._fitting(line)
        if shown != self._shown:
            self.terminal.write(f"\r\x1b[2K{shown}")
            self._shown = shown

    def _fitting(self, line: re.Match[str]) -> str:
        """The line of progress, as wide as the terminal allows, with the time that is left by now."""
        seconds = 0
        for part in line["left"].split(":"):
            seconds = 60 * seconds + int(part)
        left = max(0.0, seconds - (time.monotonic() - self._since))
        parts = re.split("  | (?=\\[)", re.sub("^step +", "step ", line[0]))
        parts[-1] = f"left {clock(left)}"
        width = shutil.get_terminal_size().columns - 1  # a line that fills the last column may wrap
        for beginning in LESS:
            if len("  ".join(parts)) > width:
                parts = [part for part in parts if not part.startswith(beginning)]
        return "  ".join(parts)[:width]

    def _coloured(self, line: str) -> str:
        colour = next((code for pattern, code in _COLOURS if pattern.match(line)), "")
        return f"\x1b[{colour}m{line}\x1b[0m" if colour and self.colours else line
