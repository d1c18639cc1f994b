"""Watching runs: who is asked for their states, how their logs are printed, how they are stopped."""

from __future__ import annotations

import io
import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import watch
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.local import local
from fiddlehead.launch.slurm import SlurmExecutor, slurm
from fiddlehead.launch.taken import refuse_taken
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run import processes
from fiddlehead.run.directory import RunDirectory, exclusive
from fiddlehead.run.status import State, Status, this_process


@dataclass(frozen=True, kw_only=True)
class Cluster(Executor):
    """A queue whose answers a test decides, and which notes what it is asked."""

    name: str = "here"
    answers: ClassVar[dict[str, Status]] = {}
    """By the run's name; else its own word counts."""
    asked: ClassVar[list[list[str]]] = []
    killed: ClassVar[list[str]] = []

    kind: ClassVar[str] = "cluster"
    queues: ClassVar[bool] = True

    def queue(self) -> str:
        return self.name

    def check(self, run: RunDirectory) -> None:
        raise NotImplementedError

    def submit(self, run: RunDirectory, *, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
        raise NotImplementedError

    def states(self, runs: Sequence[RunDirectory]) -> list[Status | None]:
        self.asked.append([run.name for run in runs])
        return [self.answers.get(run.name) or run.written_status() for run in runs]

    def kill(self, run: RunDirectory) -> None:
        self.killed.append(run.name)
        self.answers.pop(run.name, None)


@dataclass
class Runs:
    """Run directories that are made by hand."""

    folder: Path

    def made(self, name: str, state: State = State.RUNNING, executor: Executor | None = None) -> RunDirectory:
        """A run that was sent to `executor`, and whose own word is `state`."""
        run = RunDirectory(self.folder / name)
        run.logs.mkdir(parents=True)
        run.recipe.touch()
        run.command.touch()
        if executor is not None:
            executor.save(run)
        run.write_status(replace(this_process(1, executor.kind if executor else "direct"), state=state))
        return run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setitem(watch.KINDS, "cluster", Cluster)
    for name, empty in (("answers", {}), ("asked", []), ("killed", [])):
        monkeypatch.setattr(Cluster, name, empty)
    monkeypatch.setattr(watch, "ASK", 0.2)
    return Runs(tmp_path)


def later(*actions: Callable[[], object], every: float = 0.4) -> None:
    """Does things one after the other while the test goes on."""

    def act() -> None:
        for action in actions:
            time.sleep(every)
            action()

    threading.Thread(target=act, daemon=True).start()


def ended(run: RunDirectory, state: State = State.SUCCEEDED) -> Callable[[], None]:
    return lambda: run.write_status(Status(state, executor="cluster", ended=time.time()))


def append(file: Path, content: str | bytes) -> Callable[[], None]:
    def write() -> None:
        with file.open("ab") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())

    return write


def started(hour: int, where: str) -> str:
    return f"=== started 2026-01-01T{hour:02d}:00:00+0000 on n1 ({where})\n"


# -- states


def test_the_executor_is_what_was_written_down(runs: Runs):
    given = slurm("account", nodes=2, env_vars={"A": "b c"}, srun_args=["--mpi=none"])
    loaded = watch.load_executor(runs.made("a", executor=given))
    assert isinstance(loaded, SlurmExecutor)
    assert json.dumps(asdict(loaded)) == json.dumps(asdict(given))
    assert watch.load_executor(runs.made("b")) is None


def test_a_setting_of_a_later_version_is_passed_over(runs: Runs):
    run = runs.made("a", executor=local(2))
    run.executor.write_text(json.dumps({**json.loads(run.executor.read_text()), "unheard_of": 1}))
    loaded = watch.load_executor(run)
    assert loaded and loaded.ntasks_per_node == 2


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "cloud"}', '{"kind": "docker"}', "[1]"])
def test_settings_that_cannot_be_read_are_said_and_the_runs_word_counts(
    runs: Runs, content: str, capsys: pytest.CaptureFixture[str]
):
    run = runs.made("a", executor=Cluster())
    run.executor.write_text(content)
    with pytest.raises(ConfigError, match=r"a/executor\.json: cannot be read"):
        watch.load_executor(run)
    for _ in range(2):
        (status,) = watch.states([run])
        assert status and status.state is State.RUNNING
    assert capsys.readouterr().err.count("executor.json: cannot be read") == 1


def test_each_queue_is_asked_once_for_all_that_it_has(runs: Runs):
    here, there = Cluster(), Cluster(name="there")
    sent = [runs.made(name, executor=executor) for name, executor in (("a", here), ("b", there), ("c", here))]
    here_too = runs.made("d", executor=Cluster(nodes=2))
    direct = runs.made("e", State.FAILED)
    never = RunDirectory(runs.folder / "f")
    Cluster.answers["c"] = Status(State.DIED)
    found = watch.states([direct, *sent, never, here_too])
    assert sorted(Cluster.asked) == [["a", "c", "d"], ["b"]]
    assert [status and status.state for status in found] == [
        State.FAILED, State.RUNNING, State.RUNNING, State.DIED, None, State.RUNNING,
    ]  # fmt: skip


def test_a_run_that_is_sent_elsewhere_the_next_time_is_asked_for_there(runs: Runs):
    """Its settings are written before its status, so in between they are not of the job that the status tells of."""
    run = runs.made("a", State.SUCCEEDED, local())
    Cluster().save(run)
    (status,) = watch.states([run])
    assert status and status.state is State.SUCCEEDED and Cluster.asked == []


# -- logs


def test_a_log_is_followed_over_requeues_to_the_end(runs: Runs):
    run = runs.made("a", State.PENDING, Cluster())
    run.log.write_text("of an earlier submission\n")
    waiting = Status(State.PENDING, executor="cluster", reason="Priority")
    Cluster.answers["a"] = waiting
    later(
        lambda: Cluster.answers.clear(),
        append(run.log, started(10, "slurm job 7") + "one "),
        append(run.log, "line: für".encode()[:-2]),
        append(run.log, "für\n".encode()[2:]),
        lambda: Cluster.answers.update(a=replace(waiting, reason="BeginTime")),
        lambda: Cluster.answers.clear(),
        append(run.log, started(11, "slurm job 7, restart 1") + "the last\n"),
        ended(run),
    )
    out = io.StringIO()
    status = watch.follow(run, start=run.log.stat().st_size, out=out)
    assert status and status.state is State.SUCCEEDED
    assert out.getvalue().splitlines() == [
        "PENDING: Priority",
        started(10, "slurm job 7").rstrip(),
        "one line: für",
        "PENDING: BeginTime",
        started(11, "slurm job 7, restart 1").rstrip(),
        "the last",
    ]


def test_an_executor_is_asked_seldom_and_never_after_the_end(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "ASK", 0.5)
    run = runs.made("a", executor=Cluster())
    later(append(run.log, "x\n"), append(run.log, "y\n"), append(run.log, "z\n"), ended(run))
    watch.follow(run, out=io.StringIO())
    asked = len(Cluster.asked)
    assert 2 <= asked <= 6  # in 1.6 s, and at the end
    time.sleep(0.6)
    assert len(Cluster.asked) == asked


def test_all_processes_are_followed_in_whole_lines(runs: Runs):
    run = runs.made("a", executor=Cluster())
    run.log.write_text(started(1, "slurm job 7") + "old\n" + started(2, "slurm job 7, restart 1"))
    (run.logs / "rank-10.txt").write_text(started(1, "rank 10 of 11, slurm job 7") + "old\n")
    later(
        append(run.log, "zero, "),
        append(run.logs / "rank-2.txt", started(2, "rank 2 of 11, slurm job 7, restart 1") + "two\n"),
        append(run.log, "whole\n"),
        append(run.logs / "rank-10.txt", started(2, "rank 10 of 11, slurm job 7, restart 1") + "ten\n"),
        ended(run),
    )
    out = io.StringIO()
    watch.print_logs(run, "all", out)
    assert [line for line in out.getvalue().splitlines() if "started" not in line] == [
        "[rank 2] two",
        "[rank 0] zero, whole",
        "[rank 10] ten",
    ]


# -- stopping


def test_a_run_that_goes_is_asked_to_stop_and_left_to_do_so(runs: Runs):
    run = runs.made("a", executor=Cluster())
    later(ended(run, State.CANCELLED))
    status = watch.cancel(run)
    request = run.stop_request()
    assert status and status.state is State.CANCELLED and request and not request.requeue
    assert Cluster.killed == []


def sleeping(sleep: Callable[[float], None]) -> SimpleNamespace:
    """The module `time` with another `sleep`, for one module only: threads of packages sleep too."""
    return SimpleNamespace(**{**vars(time), "sleep": sleep})


def test_a_run_that_does_not_stop_is_killed(runs: Runs):
    run = runs.made("a", executor=Cluster())
    status = watch.cancel(run, patience=0.5)
    assert status and status.state is State.CANCELLED and status.reason.startswith("killed")
    assert Cluster.killed == ["a"] and run.written_status() == status


@pytest.mark.parametrize("state", [State.PENDING, State.INTERRUPTED])
def test_a_run_that_has_not_begun_is_killed_at_once(runs: Runs, state: State, monkeypatch: pytest.MonkeyPatch):
    run = runs.made("a", state, Cluster())
    monkeypatch.setattr(watch, "time", sleeping(lambda seconds: pytest.fail("it waited")))
    status = watch.cancel(run)
    assert status and status.state is State.CANCELLED and Cluster.killed == ["a"]


def test_cancelling_an_ended_run_does_nothing(runs: Runs):
    run = runs.made("a", State.SUCCEEDED, Cluster())
    status = watch.cancel(run)
    assert status and status.state is State.SUCCEEDED
    assert run.stop_request() is None and Cluster.killed == []


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_cancels_and_a_second_one_kills(runs: Runs, interrupts: int, monkeypatch: pytest.MonkeyPatch):
    run = runs.made("a", executor=Cluster())
    run.log.write_text("before\n")
    left = interrupts

    def interrupted(seconds: float) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise KeyboardInterrupt
        append(run.log, "the step is saved\n")()
        ended(run, State.CANCELLED)()

    monkeypatch.setattr(watch, "time", sleeping(interrupted))
    out = io.StringIO()
    status = watch.follow(run, out=out)
    assert status and status.state is State.CANCELLED
    assert Cluster.killed == ([] if interrupts == 1 else ["a"])
    assert ("the step is saved" in out.getvalue()) == (interrupts == 1)
    assert "cancelling: the step in hand is being saved" in out.getvalue()


def test_a_process_of_another_machine_cannot_be_killed_here(runs: Runs):
    run = runs.made("a", executor=local())
    run.write_status(replace(this_process(1, "local"), host="elsewhere", machine="another"))
    with pytest.raises(ConfigError, match=r"can be killed there only; .*`fiddlehead runs cancel a --force`"):
        watch.kill(run)
    run.recipe.touch()
    with pytest.raises(ConfigError, match=r"running \(RUNNING, process .*`fiddlehead runs cancel a --force`"):
        refuse_taken(run, tiny_test())
    with exclusive(run), pytest.raises(ConfigError, match="still has a process"):
        watch.write_off(run)
    assert watch.states([run])[0].state is State.RUNNING  # type: ignore[union-attr]
    status = watch.write_off(run)
    assert status and status.state is State.DIED and "on elsewhere is gone" in status.reason
    assert watch.states([run]) == [status]


def test_a_job_is_there_from_its_first_moment_whatever_it_is_called(runs: Runs):
    """As between fork and exec, when nothing tells yet what it will be."""
    run = runs.made("a", State.PENDING, executor=local())
    run.command.touch()
    with subprocess.Popen(["sleep", "60"]) as job:
        (run.path / "job_id").write_text(f"{job.pid}:{processes.started(job.pid)}\n")
        assert watch.states([run])[0].state is State.PENDING  # type: ignore[union-attr]
        (run.path / "job_id").write_text(f"{job.pid}:1\n")  # another process has its number since
        assert watch.states([run])[0].reason == "its process is gone, before the job began"  # type: ignore[union-attr]
        (run.path / "job_id").write_text(f"{job.pid}:{processes.started(job.pid)}\n")
        watch.kill(run)
        assert job.wait(10) < 0
