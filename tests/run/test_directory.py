"""The files of a run: its status, its stop file, its lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.files.atomic import write_atomically
from fiddlehead.run import processes
from fiddlehead.run.directory import RunDirectory, exclusive
from fiddlehead.run.status import State, Status, StopRequest, this_process


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_a_run_that_was_never_submitted_has_no_status(run: RunDirectory) -> None:
    assert run.status() is None


def test_a_status_comes_back_as_it_was_written(run: RunDirectory) -> None:
    status = replace(this_process(3, "slurm"), state=State.FAILED, ended=2.5, exit_code=9, reason='said "no"\nand left')
    run.write_status(status)
    assert run.written_status() == run.status() == status
    assert run.written_status().state is State.FAILED  # type: ignore[union-attr]


def test_this_process_isalive(run: RunDirectory) -> None:
    status = this_process(1, "direct")
    run.write_status(status)
    assert run.status() == status and status.state is State.RUNNING and status.pid == os.getpid()


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING, State.INTERRUPTED])
def test_a_run_whose_process_is_gone_has_died(run: RunDirectory, state: State) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = processes.started(child.pid)
    assert started is not None
    run.write_status(replace(this_process(1, "local"), state=state, pid=child.pid, process_started=started))
    assert run.status().state is state  # type: ignore[union-attr]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but a zombie until it is waited for
    died = run.status()
    assert died is not None and died.state is State.DIED and died.reason == f"process {child.pid} is gone"
    child.communicate()
    assert run.status() == died
    assert run.written_status().state is state, "looking changes nothing"  # type: ignore[union-attr]


def test_a_pid_that_another_process_has_since_is_not_the_run(run: RunDirectory) -> None:
    status = this_process(1, "local")
    run.write_status(replace(status, process_started=status.process_started - 1))
    assert run.status().state is State.DIED  # type: ignore[union-attr]


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED])
def test_what_has_ended_stays_as_it_ended(run: RunDirectory, state: State) -> None:
    run.write_status(replace(this_process(1, "local"), state=state, pid=2**30))
    assert run.status().state is state  # type: ignore[union-attr]


def test_three_states_are_not_ends() -> None:
    assert {state for state in State if not state.ended} == {State.PENDING, State.RUNNING, State.INTERRUPTED}


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    file = tmp_path / "status"
    texts = [character * 20_000 for character in "ab"]
    write_atomically(file, texts[0])
    done = threading.Event()

    def write() -> None:
        for i in range(100):
            write_atomically(file, texts[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert file.read_text() in texts
    writer.join()
    assert os.listdir(tmp_path) == ["status"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "status", "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "status", "new")
    assert os.listdir(tmp_path) == ["status"] and (tmp_path / "status").read_text() == "old"


def test_a_cancellation_replaces_a_requeue_and_nothing_else(run: RunDirectory) -> None:
    assert run.stop_request() is None
    for reason, requeue, kept in (
        ("SIGUSR1", True, "SIGUSR1"),
        ("SIGTERM", True, "SIGUSR1"),
        ("cancelled", False, "cancelled"),
        ("again", False, "cancelled"),
        ("SIGUSR1", True, "cancelled"),
    ):
        run.request_stop(StopRequest(reason, requeue))
        request = run.stop_request()
        assert request and request.reason == kept
    run.clear_stop_request()
    run.clear_stop_request()
    assert run.stop_request() is None


def test_an_empty_stop_file_is_a_cancellation(run: RunDirectory) -> None:
    (run.path / "stop").touch()
    request = run.stop_request()
    assert request and not request.requeue


def test_a_request_is_of_the_newest_submission_or_before(run: RunDirectory) -> None:
    run.request_stop(StopRequest("cancelled"))
    assert not run.stop_requested_since_submission()  # it was never submitted
    run.command.write_text("fiddlehead pretrain\n")
    os.utime(run.command, (1, 1))
    assert run.stop_requested_since_submission()
    os.utime(run.command, (2e9, 2e9))
    assert not run.stop_requested_since_submission()


def test_the_status_file_is_plain_json(run: RunDirectory) -> None:
    run.write_status(Status(State.PENDING))
    assert json.loads((run.path / "status").read_text())["state"] == "PENDING"


def test_a_run_belongs_to_one_process_at_a_time(run: RunDirectory) -> None:
    with exclusive(run), pytest.raises(ConfigError, match="is running"), exclusive(run, patience=0.1):
        pass
    with exclusive(run):
        pass


def test_a_lock_that_a_lost_machine_has_left_is_waited_for(run: RunDirectory) -> None:
    lock = exclusive(run)
    lock.__enter__()
    threading.Timer(0.2, lock.__exit__, (None, None, None)).start()
    with exclusive(run, patience=20):
        pass


def test_a_status_that_cannot_be_read_is_said(run: RunDirectory) -> None:
    (run.path / "status").write_text("{")
    with pytest.raises(
        ConfigError, match=r"status is damaged: .*; delete it once the run's process is gone, and start the run"
    ):
        run.status()
    (run.path / "status").write_text('{"state": "SUCCEEDED", "of_a_newer_version": 1}')
    status = run.status()
    assert status and status.state is State.SUCCEEDED
