"""Run directories: what state a run is in, and how it is found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.files.atomic import write_atomically
from fiddlehead.run import directory as runs
from fiddlehead.run import processes
from fiddlehead.run.directory import (
    RunDirectory,
    State,
    Status,
    StopRequest,
    find_run,
    list_runs,
    reserve_name,
    this_process,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def make(directory: Path, name: str, age: int = 0) -> RunDirectory:
    run = RunDirectory(directory / name)
    run.path.mkdir(parents=True)
    run.recipe.touch()
    os.utime(run.recipe, (1e9 - age, 1e9 - age))
    return run


# -- status


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


def test_a_process_elsewhere_runs_while_it_touches_its_lock(run: RunDirectory) -> None:
    run.write_status(replace(this_process(1, "direct"), **ELSEWHERE))
    assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    status = replace(this_process(1, "direct"), **ELSEWHERE, started=time.time() - 9000)
    run.write_status(status)
    aged(run, runs.MISSING - 60)
    assert run.status() == status
    aged(run, runs.MISSING + 60)
    died = run.status()
    assert died and died.state is State.DIED and died.reason == f"process {2**30} of elsewhere is gone"


def test_a_process_elsewhere_that_has_the_lock_runs(run: RunDirectory) -> None:
    run.write_status(replace(this_process(1, "direct"), **ELSEWHERE, started=0.0))
    with runs.exclusive(run):
        aged(run, runs.MISSING + 60)
        assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    aged(run, runs.MISSING + 60)
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
    monkeypatch.setattr(runs, "HEARTBEAT", 0.01)
    with runs.exclusive(run), runs.showing_life(run):
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
    monkeypatch.setattr(runs, "this_boot", lambda: "")
    monkeypatch.setattr(runs, "this_machine", lambda: "")
    host = "before" if not boot else socket.gethostname()
    words = replace(this_process(1, "direct"), host=host, machine=boot, pid=2**30)
    run.write_status(words)
    assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    run.write_status(replace(words, started=time.time() - runs.MISSING - 60))
    assert run.status().state is State.DIED  # type: ignore[union-attr]


def test_a_process_that_the_system_hides_runs_while_it_holds_the_lock(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "is_running", lambda pid, began: None)
    run.write_status(replace(this_process(1, "direct"), pid=2**30))
    with runs.exclusive(run):
        assert run.status().state is State.RUNNING  # type: ignore[union-attr]
    assert run.status().state is State.DIED  # type: ignore[union-attr]


@pytest.mark.parametrize("state", [State.RUNNING, State.SUCCEEDED])
def test_a_run_that_goes_on_or_ends_while_it_is_looked_at_has_not_died(
    run: RunDirectory, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process writes how it ended and is gone, after its status was read and before its process is looked for."""
    run.write_status(replace(this_process(1, "local"), state=State.PENDING, pid=2**30))
    after, alive = replace(this_process(1, "local"), state=state), runs.alive

    def later(run: RunDirectory, status: Status) -> bool:
        if status.state is State.PENDING:
            run.write_status(after)
        return alive(run, status)

    monkeypatch.setattr(runs, "alive", later)
    assert run.status() == after


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED])
def test_what_has_ended_stays_as_it_ended(run: RunDirectory, state: State) -> None:
    run.write_status(replace(this_process(1, "local"), state=state, pid=2**30))
    assert run.status().state is state  # type: ignore[union-attr]


def test_three_states_are_not_ends() -> None:
    assert {state for state in State if not state.ended} == {State.PENDING, State.RUNNING, State.INTERRUPTED}


# -- files


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


def test_the_newest_value_of_each_metric_is_shown(run: RunDirectory) -> None:
    assert run.last_metrics() == {}
    run.metrics.write_text("step,loss,val_loss\n1,3.0,\n2,2.0,\n2,,2.5\n3,1.0,\n")
    assert run.last_metrics() == {"step": "3", "loss": "1.0", "val_loss": "2.5"}


def test_of_a_large_table_the_end_is_read(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_METRICS_READ", 1000)
    rows = "".join(f"{step},{step / 7},\n" for step in range(2, 1000))
    run.metrics.write_text(f"step,loss,val_loss\n1,3.0,2.5\n{rows}1000,0.")  # the last row is being written
    assert run.last_metrics() == {"step": "999", "loss": str(999 / 7)}
    assert run.last_step() == 999


@pytest.mark.parametrize("text", ["", "step,loss\n", "step,loss\n1,2"])
def test_a_table_without_a_whole_row_is_before_the_first_step(run: RunDirectory, text: str) -> None:
    run.metrics.write_text(text)
    assert run.last_metrics() == {} and run.last_step() == 0


# -- stop requests


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


# -- names


def test_a_run_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "runs", "gpt2-long")
    monkeypatch.chdir(tmp_path)
    assert find_run("gpt2-long") == find_run("runs/gpt2-long") == find_run(str(run.path), "other") == run
    monkeypatch.chdir(run.path)
    assert find_run(".") == run and find_run(".").name == "gpt2-long"


def test_a_name_that_no_run_has_is_refused_with_the_nearest(working_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown run 'x'; allowed: none \(looked in runs/\)"):
        find_run("x")
    make(working_directory / "runs", "gpt2-long")
    (working_directory / "runs" / "gpt2-lang").mkdir()  # no run: it has no recipe
    with pytest.raises(ConfigError, match=r"unknown run 'gpt2-lang'; did you mean 'gpt2-long'\? \(looked in runs/\)"):
        find_run("gpt2-lang")


def test_runs_are_listed_from_the_oldest(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    made = [make(tmp_path, name, age) for name, age in (("b", 30), ("c", 20), ("a", 10))]
    assert list_runs(tmp_path) == made


def test_a_new_name_is_no_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=lambda: datetime(2025, 1, 2, 3, 4, 5))
    monkeypatch.setattr(runs, "datetime", clock)
    names = [reserve_name("tiny", tmp_path) for _ in range(4)]
    assert all((tmp_path / name).is_dir() for name in names)
    first = "tiny-20250102-030405"
    assert names == [first, f"{first}-2", f"{first}-3", f"{first}-4"]


def test_the_status_file_is_plain_json(run: RunDirectory) -> None:
    run.write_status(Status(State.PENDING))
    assert json.loads((run.path / "status").read_text())["state"] == "PENDING"


def test_a_run_belongs_to_one_process_at_a_time(run: RunDirectory) -> None:
    with runs.exclusive(run), pytest.raises(ConfigError, match="is running"), runs.exclusive(run, patience=0.1):
        pass
    with runs.exclusive(run):
        pass


def test_a_lock_that_a_lost_machine_has_left_is_waited_for(run: RunDirectory) -> None:
    lock = runs.exclusive(run)
    lock.__enter__()
    threading.Timer(0.2, lock.__exit__, (None, None, None)).start()
    with runs.exclusive(run, patience=20):
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
