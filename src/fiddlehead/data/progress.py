"""Progress in bytes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """A context manager that shows on stderr how many of `total` bytes are done, how fast, and the time left."""

    def __init__(self, what: str, total: int, enabled: bool) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._enabled = enabled
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if enabled and console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=console)
            self._bar.add_task(what, total=total)

    def advance(self, num_bytes: int) -> None:
        """Counts `num_bytes` more as done."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], num_bytes)
        elif self._enabled and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line()

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and kind is None:
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = self._done / seconds
        left = (self._total - self._done) / speed if speed else float("inf")
        sys.stderr.write(
            f"{self._what}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, "
            f"{seconds:.0f} s, {left:.0f} s to go\n"
        )
