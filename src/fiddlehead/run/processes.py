"""Identifies processes, even if a process id is used again or the machine gets another name."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from functools import cache
from pathlib import Path

import psutil


@cache
def this_machine() -> str:
    """Identifies where process ids have the same meaning as here: the kernel's boot and the PID namespace.

    A machine that is renamed keeps it; a container or a pod has one of its own. macOS has no namespaces, so there it is
    `this_boot`; "" where that is not known.
    """
    try:
        return f"{this_boot()}/{Path('/proc/self/ns/pid').readlink().name}"
    except OSError:
        return this_boot()


@cache
def this_boot() -> str:
    """An id of the kernel's boot, the same in all containers on this machine; "" if it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return sysctl("kern.bootsessionuuid")


def sysctl(name: str) -> str:
    """A value of macOS's kernel; "" where there is none of this name."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip()


def started(pid: int) -> int | None:
    """When process `pid` began, in clock ticks; None if there is none, or only a zombie, and 0 if it is hidden.

    It is known from the first moment of a process, and stays the same when it becomes another program. On Linux it is
    counted from boot, and elsewhere from the epoch: neither changes when the clock is set.
    """
    if pid <= 0:
        return None
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        # On Linux, the system counts from boot, and psutil adds the time of that.
        began = process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0)
    except psutil.AccessDenied:
        return 0
    except psutil.NoSuchProcess:  # or a zombie
        return 0 if _is_hidden(pid) else None
    return round(began * os.sysconf("SC_CLK_TCK"))


def _is_hidden(pid: int) -> bool:
    """Whether a process belongs to another user and the system hides its details."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return False


def is_running(pid: int, began: int) -> bool | None:
    """Whether the process `pid` that `started` at `began` runs; None if the system does not say."""
    now = started(pid)
    if now is None:
        return False
    return now == began if now and began else None


def usable_cpus() -> int:
    """The number of CPUs that this process may use; all CPUs if the system does not restrict it."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def die_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent, which is process `parent`, ends."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:  # macOS

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)  # it was gone before
