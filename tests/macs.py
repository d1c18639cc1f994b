"""Simulates a Mac for this package: no /proc, psutil with a Mac's answers, and no Linux-only features."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fiddlehead import environment
from fiddlehead.data import chat_template
from fiddlehead.run import processes

BOOT_SESSION = "6E1C0D3B-0000-4000-8000-5D5C1A2B3C4D"
_hidden = False


def _hide(event: str, arguments: tuple[Any, ...]) -> None:
    if _hidden and event == "open" and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


sys.addaudithook(_hide)


@contextlib.contextmanager
def _proc(hidden: bool) -> Iterator[None]:
    global _hidden
    before, _hidden = _hidden, hidden
    try:
        yield
    finally:
        _hidden = before


class _Process:
    """psutil's, which on a Mac gets the same from the kernel: when it began is in seconds since the epoch."""

    def __init__(self, pid: int) -> None:
        with _proc(hidden=False):
            self._found = psutil.Process(pid)

    def status(self) -> str:
        with _proc(hidden=False):
            return self._found.status()

    def create_time(self) -> float:
        with _proc(hidden=False):
            return self._found.create_time()


@pytest.fixture
def a_mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process is on a Mac until the test ends. `sysctl` is part of it; GNU's and util-linux's programs are not."""
    fake = SimpleNamespace(
        LINUX=False, Process=_Process, virtual_memory=lambda: SimpleNamespace(total=16 << 30),
        STATUS_ZOMBIE=psutil.STATUS_ZOMBIE, NoSuchProcess=psutil.NoSuchProcess, AccessDenied=psutil.AccessDenied,
    )  # fmt: skip
    known = {"kern.bootsessionuuid": BOOT_SESSION, "machdep.cpu.brand_string": "Apple M9"}
    for module in (processes, environment):
        monkeypatch.setattr(module, "psutil", fake)
        monkeypatch.setattr(module, "sysctl", lambda name: known.get(name, ""))
    readlink, which = os.readlink, shutil.which

    def no_link(path: Any, **options: Any) -> Any:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return readlink(path, **options)

    monkeypatch.setattr(os, "readlink", no_link)
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None if name == "flock" else which(name, *rest))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(signal, "sigwaitinfo")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(chat_template, "LIMITED", False)
    caches = (processes.this_machine, processes.this_boot)
    for each in caches:
        each.cache_clear()
    with _proc(hidden=True):
        yield monkeypatch
    for each in caches:
        each.cache_clear()
