"""Writes files completely or not at all, and so that they outlast a crash."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path


def write_atomically(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new and never a part.

    `mode` is what `open(2)` takes: the process's umask applies.
    """
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno and error.filename is None:  # what writes, and not opens, does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names of the files in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
