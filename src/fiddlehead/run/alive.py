"""Whether the process of a run lives, wherever it is: by its number on its own machine, elsewhere by the run's lock."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fiddlehead.run import locks
from fiddlehead.run.processes import is_running, this_boot, this_machine
from fiddlehead.run.status import State, Status

HEARTBEAT, MISSING = 30.0, 600.0
"""Seconds between two signs of life of a run's process, and after how many without one it is gone."""


def is_here(status: Status) -> bool:
    """Whether the process that wrote `status` was one of this machine, or container, so that its number says who it is.

    The name of the machine does not count, unless nothing better was written down: it may be another by now.
    """
    return status.machine == this_machine() if status.machine else status.host == socket.gethostname()


def alive(lock: Path, status: Status) -> bool:
    """Whether the process that wrote `status` runs.

    One that cannot be looked at from here runs if it holds the run's lock. Where it does not, it is gone if it would
    have to share the lock with this machine, or if it has not touched the lock for `MISSING` seconds.
    """
    if is_here(status) and (known := is_running(status.pid, status.process_started)) is not None:
        return known
    if is_locked(lock):
        return True
    boot = status.machine.partition("/")[0]
    if boot and this_boot():
        if boot != this_boot() and status.host == socket.gethostname():
            return False  # it was this machine, which has started again since
        if boot == this_boot() and status.state is not State.PENDING:  # before it begins, a run is not locked
            return False
    return time.time() - last_heard_of(lock, status) < MISSING


def is_locked(lock: Path) -> bool:
    """Whether a process, on whatever machine, has the run to itself; False also where the file system cannot say."""
    return locks.is_taken(lock)


def last_heard_of(lock: Path, status: Status) -> float:
    """When the run's process has last shown that it runs, in seconds since the epoch.

    The time of the lock is that of the machine that keeps the file, so its clock may differ a little from this one's.
    """
    touched = lock.stat().st_mtime if lock.exists() else 0.0
    return max(status.started, touched)


def way_out(name: str) -> str:
    """What to do about a run whose machine is gone, in words."""
    return f"if that is gone: `fiddlehead runs cancel {name} --force`"


@contextlib.contextmanager
def showing_life(lock: Path) -> Iterator[None]:
    """Touches the run's lock every `HEARTBEAT` seconds until the block ends, for those who cannot see this process."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a shared file system stumbles; the next time is soon
                os.utime(lock)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
