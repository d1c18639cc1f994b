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


def test_this_process_is_alive(run: RunDirectory) -> None:
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
def test_an_ended_run_keeps_its_state(run: RunDirectory, state: State) -> None:
    run.write_status(replace(this_process(1, "local"), state=state, pid=2**30))
    assert run.status().state is state  # type: ignore[union-attr]


def test_only_three_states_are_not_final() -> None:
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
    run.write_status(replace(this_process(3, "slurm"), submission=2))  # attempt 2 was queued again
    run.clear_stop_request()
    run.request_stop(StopRequest("cancelled"))
    request = run.stop_request()
    assert request and request.attempt == 3 and run.stop_requested_since_submission()
    run.write_status(replace(this_process(4, "slurm"), submission=2))
    assert run.stop_requested_since_submission()
    run.write_status(replace(this_process(4, "slurm"), submission=4))
    assert not run.stop_requested_since_submission()
    run.request_stop(StopRequest("SIGUSR1", requeue=True))  # the earlier one does not stand in its way
    assert run.stop_request() == StopRequest("SIGUSR1", requeue=True, attempt=4)


@pytest.mark.parametrize("content", ['{"reason": "cancelled"}', "", "now"])
@pytest.mark.parametrize("submission", [0, 2])
def test_a_request_without_a_number_is_of_the_newest_submission(
    run: RunDirectory, content: str, submission: int
) -> None:
    """It was written by hand or by an earlier version, since the launch: that deletes what is there."""
    (run.path / "stop").write_text(content)
    run.write_status(replace(this_process(2, "slurm"), submission=submission))
    assert run.stop_requested_since_submission()


# -- the job


def test_a_job_is_of_the_submission_that_its_file_names_whatever_the_clocks_say(run: RunDirectory) -> None:
    assert not run.submitted and run.job_id == ""
    pending = replace(this_process(1, "slurm"), state=State.PENDING, submission=1)
    run.write_status(pending)
    run.write_job_id("17")
    for now in (0, 4e9):
        os.utime(run.path / "job_id", (now, now))
        for attempt, state in ((1, State.PENDING), (1, State.RUNNING), (2, State.RUNNING), (3, State.INTERRUPTED)):
            run.write_status(replace(pending, attempt=attempt, state=state))  # queued again by itself
            assert run.submitted and run.job_id == "17"
        for state in (State.PENDING, State.RUNNING):  # a job may begin before its launcher has its number
            run.write_status(replace(pending, attempt=4, submission=4, state=state))
            assert not run.submitted
    run.write_job_id("18")
    assert run.submitted and run.job_id == "18"


@pytest.mark.parametrize("content", ["17\n", "17", "17\nx\n", "17\n-1\n", "17\n²\n"])
def test_a_job_without_a_number_is_of_an_earlier_version_s_launch(run: RunDirectory, content: str) -> None:
    (run.path / "job_id").write_text(content)
    run.write_status(replace(this_process(3, "slurm"), state=State.PENDING))
    assert run.submitted and run.job_id == "17"
    run.write_status(replace(this_process(4, "slurm"), state=State.PENDING, submission=4))
    assert not run.submitted, "it was launched again since"


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
        ConfigError, match=r"status: is damaged: .*; delete it once the run's process is gone, and start the run"
    ):
        run.status()
    (run.path / "status").write_text('{"state": "SUCCEEDED", "of_a_newer_version": 1}')
    status = run.status()
    assert status and status.state is State.SUCCEEDED
