"""Whether the process of a run is alive, as far as this machine can know."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.run import alive, directory, processes
from fiddlehead.run.directory import RunDirectory, exclusive
from fiddlehead.run.status import State, Status, this_process


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


BOOT, NAMESPACE = processes.this_machine().split("/")


ELSEWHERE = {"host": "elsewhere", "machine": "another-boot/pid:[1]", "pid": 2**30}
"""The words of a process on another machine."""


def aged(run: RunDirectory, seconds: float) -> None:
    """Lets the run's process have touched its lock so long ago."""
    run.lock.touch()
    os.utime(run.lock, (time.time() - seconds, time.time() - seconds))


def test_a_machine_with_another_name_knows_its_processes(run: RunDirectory) -> None:
    run.write_status(replace(this_process(1, "local"), host="before"))
    assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    run.write_status(replace(this_process(1, "local"), host="before", pid=2**30))
    assert run.status().state is State.DIED  # type: ignore[union-attr]


def test_a_process_elsewhere_is_alive_while_it_touches_its_lock(run: RunDirectory) -> None:
    run.write_status(replace(this_process(1, "direct"), **ELSEWHERE))
    assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    status = replace(this_process(1, "direct"), **ELSEWHERE, started=time.time() - 9000)
    run.write_status(status)
    aged(run, alive.MISSING - 60)
    assert run.status() == status
    aged(run, alive.MISSING + 60)
    died = run.status()
    assert died and died.state is State.DIED and died.reason == f"process {2**30} of elsewhere is gone"


def test_a_process_elsewhere_that_holds_the_lock_is_alive(run: RunDirectory) -> None:
    run.write_status(replace(this_process(1, "direct"), **ELSEWHERE, started=0.0))
    with exclusive(run):
        aged(run, alive.MISSING + 60)
        assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    aged(run, alive.MISSING + 60)
    assert run.status().state is State.DIED  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ({"machine": f"{BOOT}/pid:[1]"}, State.DIED),  # another container of this machine, without the lock
        ({"machine": f"another-boot/{NAMESPACE}", "host": socket.gethostname()}, State.DIED),  # this machine, restarted
        ({"machine": f"{BOOT}/pid:[1]", "state": State.PENDING}, State.PENDING),  # which has no lock yet
        ({"machine": ""}, State.RUNNING),  # of an earlier version, elsewhere
        ({"machine": "", "host": socket.gethostname()}, State.DIED),
    ],
)
def test_what_is_known_at_once_of_a_process_that_cannot_be_seen(run: RunDirectory, words: dict, state: State) -> None:
    run.write_status(replace(this_process(1, "direct"), **{**ELSEWHERE, **words}))
    assert run.status().state is state  # type: ignore[union-attr]


def test_a_run_shows_that_it_lives(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "HEARTBEAT", 0.01)
    with exclusive(run), alive.showing_life(run.lock):
        aged(run, 100)
        deadline = time.monotonic() + 10
        while run.lock.stat().st_mtime < time.time() - 50:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("boot", ["", "another-boot"])
def test_where_the_boot_is_not_known_a_run_is_not_taken_for_one_before_it(
    run: RunDirectory, boot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the time that a run elsewhere has, and then it is gone."""
    monkeypatch.setattr(alive, "this_boot", lambda: "")
    monkeypatch.setattr(alive, "this_machine", lambda: "")
    host = "before" if not boot else socket.gethostname()
    words = replace(this_process(1, "direct"), host=host, machine=boot, pid=2**30)
    run.write_status(words)
    assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    run.write_status(replace(words, started=time.time() - alive.MISSING - 60))
    assert run.status().state is State.DIED  # type: ignore[union-attr]


def test_a_process_that_the_system_hides_is_alive_while_it_holds_the_lock(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alive, "is_running", lambda pid, began: None)
    run.write_status(replace(this_process(1, "direct"), pid=2**30))
    with exclusive(run):
        assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    assert run.status().state is State.DIED  # type: ignore[union-attr]


@pytest.mark.parametrize("state", [State.RUNNING, State.SUCCEEDED])
def test_a_run_that_goes_on_or_ends_while_it_is_looked_at_has_not_died(
    run: RunDirectory, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process writes how it ended and is gone, after its status was read and before its process is looked for."""
    run.write_status(replace(this_process(1, "local"), state=State.PENDING, pid=2**30))
    after, looked = replace(this_process(1, "local"), state=state), directory.alive

    def later(lock: Path, status: Status) -> bool:
        if status.state is State.PENDING:
            run.write_status(after)
        return looked(lock, status)

    monkeypatch.setattr(directory, "alive", later)
    assert run.status() == after
