"""Locks on files, by `flock`: Linux and macOS have it, and the kernel lets go when the holder ends, however it ends.

What the package needs of it, and the filelock package has not: a shared lock, by which a folder of somebody else's can
be asked without writing to it; a wait without polling; and a lock on a file that is open already, and has content.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def take(file: IO) -> bool:
    """Locks an open file for this process alone, until it is closed; False at once if another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for(file: IO) -> None:
    """Waits until no other process has locked an open file, then locks it for this process."""
    fcntl.flock(file, fcntl.LOCK_EX)


def wait_until_free(path: Path) -> None:
    """Waits until no process has locked a file, which others may do, or find out, meanwhile and afterwards."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def is_taken(path: Path) -> bool:
    """Whether a process, on whatever machine, has locked the file; False also where the file system cannot say."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
