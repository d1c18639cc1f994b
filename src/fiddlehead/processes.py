"""Which process is which: by what survives when a machine gets another name, and a number is used again."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def this_machine() -> str:
    """What tells where a process number means what it means here: the boot of the kernel, and the PID namespace.

    A machine that is renamed keeps it; a container or a pod has one of its own; "" where there is no /proc.
    """
    try:
        return f"{this_boot()}/{Path('/proc/self/ns/pid').readlink().name}"
    except OSError:
        return ""


@cache
def this_boot() -> str:
    """What this machine's kernel and all containers on it have in common until it starts again; "" without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def started(pid: int) -> int | None:
    """When process `pid` began, in clock ticks since boot; None if there is none, or only a zombie.

    It is known from the first moment of a process, and stays the same when it becomes another program.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return None if fields[0] == "Z" else int(fields[19])
