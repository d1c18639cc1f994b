"""The properties that every reader must have for every input."""

from __future__ import annotations

import contextlib
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, RunError
from tests.fuzz.readers import Reader

SECONDS = 2.0
"""CPU time in which a file is read or refused."""
MEGABYTES = 200
"""Memory that this may take, beside what was in use."""


class FaultError(Exception):
    """A reader has not refused a file in the way that it must."""


def check(reader: Reader, folder: Path, content: bytes) -> None:
    """Reads a valid folder in which one file has other content; raises FaultError unless it is read or refused."""
    damaged = folder.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder, damaged)
    (damaged / reader.file).write_bytes(content)
    before = _peak(reset=True)
    try:
        with _limit():
            reader.read(damaged)
    except (ConfigError, RunError) as error:
        if not str(error) or len(str(error)) > 30_000:
            raise FaultError(f"an error of {len(str(error))} characters for {content[:300]!r}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise FaultError(f"{said} ({where.filename}:{where.lineno}) for {_shown(content)}") from error
    if (grown := _peak() - before) > MEGABYTES:
        raise FaultError(f"{grown} MB for {_shown(content)}")


def _shown(content: bytes) -> str:
    return repr(content if len(content) < 1500 else content[:1000] + b" ... " + content[-400:])


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def _peak(reset: bool = False) -> int:
    """The most memory that this process has had, in MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10
