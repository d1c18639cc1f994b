"""The identification of processes, on Linux and on a Mac."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fiddlehead.environment import describe_environment, describe_machine
from fiddlehead.run import processes
from fiddlehead.run.processes import is_running, started, this_boot, this_machine, usable_cpus
from tests.macs import BOOT_SESSION


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_on_linux_a_start_is_what_the_kernel_says(tmp_path: Path) -> None:
    """/proc/PID/stat has the name in parentheses, which may hold anything, and the start is the 22nd field."""
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to("/bin/sleep")
    with child(str(program), "60") as process:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert started(process.pid) == int(fields[19])
        assert is_running(process.pid, int(fields[19])) is True
        assert is_running(process.pid, int(fields[19]) + 1) is False


def test_a_start_does_not_change_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = started(os.getpid()), psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: now + 3600)
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: now + 3600)
    assert started(os.getpid()) == before


def test_a_start_stays_while_a_process_becomes_other_programs() -> None:
    """The shell has begun before the program that it becomes, whatever it is called in between."""
    with child("bash", "-c", "read; exec sleep 60") as process:
        before = started(process.pid)
        assert before
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.flush()
        deadline = time.monotonic() + 10
        while (name := psutil.Process(process.pid).name()) != "sleep":
            assert time.monotonic() < deadline and started(process.pid) == before, name
        assert is_running(process.pid, before) is True


@pytest.mark.parametrize("pid", [0, -1, 2**30, 2**80])
def test_a_number_that_no_process_has(pid: int) -> None:
    assert started(pid) is None and is_running(pid, 1) is False and is_running(pid, 0) is False


def test_a_process_that_is_hidden_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with /proc mounted with hidepid=2: another user's processes are not in it, but cannot be signalled either."""

    def hidden(pid: int, signum: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", hidden)
    assert started(2**30) == 0 and is_running(2**30, 17) is None


def test_an_unknown_start_time_decides_nothing() -> None:
    assert is_running(os.getpid(), 0) is None


def test_a_mac_knows_a_process_by_its_boot_and_start(a_mac) -> None:
    assert this_machine() == this_boot() == BOOT_SESSION
    with child(sys.executable, "-c", "input()") as process:
        began = started(process.pid)
        assert began and abs(began / os.sysconf("SC_CLK_TCK") - time.time()) < 60
        assert is_running(process.pid, began) is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_running(process.pid, began) is False, "a zombie"
    assert is_running(process.pid, began) is False


def test_a_mac_that_does_not_tell_its_boot_is_known_by_its_name_alone(a_mac) -> None:
    a_mac.setattr(processes, "sysctl", lambda name: "")
    assert this_machine() == ""


def test_a_mac_says_what_it_is(a_mac, tmp_path: Path) -> None:
    assert usable_cpus() == os.cpu_count()
    assert describe_machine([])["cpu"] == "Apple M9"
    assert describe_environment(tmp_path)["memory_gib"] == 16.0


def test_without_prctl_a_process_dies_with_its_parent_all_the_same() -> None:
    """The child of a shell that is killed: it looks who its parent is."""
    code = (
        "import ctypes, os, time, types\n"
        "ctypes.CDLL = lambda name: types.SimpleNamespace()\n"
        "from fiddlehead.run.processes import die_with_parent\n"
        "die_with_parent(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    shell = subprocess.Popen(
        ["bash", "-c", '"$@"; true', "bash", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout
    pid = int(shell.stdout.readline())
    assert started(pid)
    shell.kill()
    shell.communicate()
    deadline = time.monotonic() + 10
    while started(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
