"""Real jobs whose processes get signals, are killed and fail: the run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from fiddlehead.errors import ConfigError, StopRequested
from fiddlehead.job import LAUNCHER_LOCK, _launcher_lock, _outlive, execute
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run import locks, outcomes, preflight, workers
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, StopRequest, this_process
from tests import warm
from tests.conftest import cpu_seconds

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")
PARTS = '''
import os, threading, time
from lightning.pytorch import Callback

class Pause(Callback):
    """Makes steps long enough to be interrupted."""
    def on_train_batch_start(self, trainer, *args):
        time.sleep(0.05)

class Fail(Callback):
    """Raises before a step, in one rank, as a user's mistake does."""
    def __init__(self, step, rank=0):
        self.step, self.rank = step, rank
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            self.fail()
    def fail(self):
        raise KeyError("the user's mistake")

class FailAndStay(Fail):
    """Its process would not end by itself, as with NCCL, which waits for what the other ranks do not do."""
    def fail(self):
        threading.Thread(target=time.sleep, args=(600,)).start()
        super().fail()
'''


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the recipes of this file use beside the library."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "job_parts.py").write_text(PARTS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@dataclass
class Job:
    """A run, and the processes of its present attempt."""

    run: RunDirectory
    modules: Path
    variables: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen] = field(default_factory=list)
    attempt: int = -1
    started_by: type[subprocess.Popen] = warm.Popen
    """`subprocess.Popen` where the test is of what a new interpreter does first or last."""

    def start(self, *places: dict[str, str]) -> Job:
        """Starts a process in each place, which is what its scheduler tells it, as the next attempt."""
        self.attempt += 1
        common = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{self.modules}{os.pathsep}{os.environ['PYTHONPATH']}",
            "SLURM_RESTART_COUNT": str(self.attempt),
            **self.variables,
        }
        command = [sys.executable, "-m", "fiddlehead.job", str(self.run.recipe), "--allow", "job_parts"]
        with self.run.log.open("a") as log:
            self.processes = [
                self.started_by(
                    command, env=os.environ | common | place, stdout=log, stderr=log, start_new_session=True
                )
                for place in places or [{}]
            ]
        return self

    def at_step(self, step: int) -> Job:
        """Waits until a step is logged."""
        wait_until(lambda: self.run.last_step() >= step or self.processes[0].poll() is not None)
        assert self.processes[0].poll() is None, self.run.log.read_text()
        return self

    def signal(self, signum: int) -> Job:
        """Signals every process, as a scheduler does."""
        for process in self.processes:
            os.killpg(process.pid, signum)
        return self

    def end(self) -> tuple[int, ...]:
        """Waits for the end of all processes; their exit codes."""
        codes = tuple(process.wait(timeout=120) for process in self.processes)
        wait_until(lambda: not any(children(process.pid) for process in self.processes), 5)
        return codes

    @property
    def status(self) -> Status:
        status = self.run.written_status()
        assert status is not None
        return status

    @property
    def losses(self) -> list[tuple[str, ...]]:
        with self.run.metrics.open() as file:
            return [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)]


Make = Callable[..., Job]
Losses = Callable[[int], list[tuple[str, ...]]]


def parts(name: str, **arguments: Any) -> fdl.Config:
    """A callback of `PARTS`."""
    return fdl.Config(getattr(importlib.import_module("job_parts"), name), **arguments)


def children(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def free_port() -> str:
    with socket.socket() as found:
        return str(workers.free_address(found)[1])


def make_run(
    folder: Path, *, nodes: int = 1, devices: int = 1, callbacks: tuple = (), num_workers: int = 0
) -> RunDirectory:
    recipe = tiny_test()
    recipe.trainer.num_nodes, recipe.trainer.devices = nodes, devices
    recipe.data.num_workers = num_workers
    if callbacks:
        recipe.trainer.callbacks = list(callbacks)
    run = RunDirectory(folder)
    folder.mkdir()
    recipe.save(run.recipe)
    run.command.write_text("fiddlehead pretrain\n")
    run.write_status(replace(this_process(1, "slurm"), state=State.PENDING))
    return run


@pytest.fixture
def make(tmp_path: Path, modules: Path) -> Iterator[Make]:
    """Makes a run that pauses in each step, and a job for it that may be requeued."""
    made: list[Job] = []

    def make(**changes) -> Job:
        callbacks = (parts("Pause"), *changes.pop("callbacks", ()))
        variables = changes.pop("variables", {"FIDDLEHEAD_REQUEUES": "9"})
        run = make_run(tmp_path / f"run-{len(made)}", callbacks=callbacks, **changes)
        made.append(Job(run, modules, variables))
        return made[-1]

    yield make
    for process in (process for job in made for process in job.processes):
        if children(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, modules: Path) -> Losses:
    """The losses of a run with so many processes that nothing happens to."""
    found: dict[int, list[tuple[str, ...]]] = {}

    def losses(devices: int) -> list[tuple[str, ...]]:
        if devices not in found:
            job = Job(make_run(tmp_path_factory.mktemp("whole") / "run", devices=devices), modules).start()
            assert job.end() == (0,)
            found[devices] = job.losses
        return found[devices]

    return losses


def two_nodes() -> list[dict[str, str]]:
    """What Slurm tells a process on each of two nodes."""
    common = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [common | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)} for node in range(2)]


def two_tasks() -> list[dict[str, str]]:
    """What Slurm tells the processes that `srun --ntasks-per-node=2` starts."""
    common = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "run"}
    common |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [common | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]


# -- signals


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_stopped_killed_and_started_again_it_ends_equal(make: Make, undisturbed: Losses, devices: int) -> None:
    job = make(devices=devices)
    for step, signum in ((3, signal.SIGTERM), (13, signal.SIGUSR1), (17, signal.SIGKILL)):
        (code,) = job.start().at_step(step).signal(signum).end()
        if signum == signal.SIGKILL:
            assert (code, job.status.state) == (-signal.SIGKILL, State.RUNNING)
            continue
        assert (code, job.status.state) == (75, State.INTERRUPTED), job.run.log.read_text()
        last = job.run.last_step()
        assert job.status.reason == f"stopped after step {last}, which is saved: {signal.Signals(signum).name}"
        assert (job.run.checkpoints / f"step-{last:08d}").is_dir()
    assert job.start().end() == (0,)
    assert job.losses == undisturbed(devices)
    assert (job.status.state, job.status.attempt, job.status.executor) == (State.SUCCEEDED, 4, "slurm")
    assert "WARNING: attempt 3 ended without a word" in job.run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("place", [two_nodes, pytest.param(two_tasks, marks=pytest.mark.long)])
def test_two_nodes_or_two_tasks_are_one_run(make: Make, undisturbed: Losses, place: Callable) -> None:
    job = make(nodes=2) if place is two_nodes else make(devices=2)
    job.start(*place()).at_step(3).signal(signal.SIGUSR1)
    assert job.end() == (75, 0), job.run.log.read_text()
    assert job.status.state is State.INTERRUPTED
    job.start(*place()).at_step(15)
    job.processes[1].kill()
    assert job.end() == (75, -signal.SIGKILL)
    assert job.status.state is State.INTERRUPTED and job.status.failures == 1, job.status
    assert job.start(*place()).end() == (0, 0)
    assert job.losses == undisturbed(2)
    rank_log = (job.run.logs / "rank-1.txt").read_text()
    assert rank_log.count("=== started ") == 3 and "(rank 1 of 2, slurm job 17, restart 2)" in rank_log


@pytest.mark.slow
def test_a_killed_process_of_two_is_named_and_the_other_ended(make: Make) -> None:
    job = make(devices=2).start().at_step(2)
    victim = max(children(job.processes[0].pid))
    os.kill(victim, signal.SIGKILL)
    assert job.end() == (75,)
    assert job.status.state is State.INTERRUPTED
    assert "rank 1 on" in job.status.reason and "killed by SIGKILL" in job.status.reason


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(make: Make) -> None:
    job = make(devices=2).start().at_step(2)
    assert len(children(job.processes[0].pid)) == 3
    job.processes[0].kill()
    job.end()  # which looks for what is left


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("delay", [0.0, 3.0])
def test_a_signal_before_training_ends_it_at_once(make: Make, devices: int, delay: float) -> None:
    job = make(devices=devices)
    job.started_by = subprocess.Popen
    job.start()
    wait_until(lambda: listens(job.processes[0].pid))
    time.sleep(delay)
    began = time.monotonic()
    assert job.signal(signal.SIGUSR1).end() == (75,), job.run.log.read_text()
    assert time.monotonic() - began < 10  # and not after some steps
    assert job.status.state in (State.PENDING, State.INTERRUPTED)


@pytest.mark.slow
def test_where_nobody_requeues_a_signal_cancels(make: Make) -> None:
    job = make(variables={})
    job.started_by = subprocess.Popen
    job.start().at_step(2).signal(signal.SIGTERM)
    assert job.end() == (130,)
    assert job.status.state is State.CANCELLED and "which is saved: SIGTERM" in job.status.reason


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait(make: Make) -> None:
    job = make(devices=2).start().at_step(2)
    job.signal(signal.SIGSTOP)
    os.kill(job.processes[0].pid, signal.SIGCONT)
    os.kill(job.processes[0].pid, signal.SIGINT)  # the processes that train are stopped: no step will end
    wait_until(lambda: job.run.stop_request() is not None)
    os.kill(job.processes[0].pid, signal.SIGINT)
    assert job.end() == (130,)
    assert job.status.state is State.CANCELLED and "by a second SIGINT" in job.status.reason


@pytest.mark.slow
def test_the_stop_file_stops_it_and_says_why(make: Make) -> None:
    job = make().start().at_step(2)
    job.run.request_stop(StopRequest("cancelled by me"))
    assert job.end() == (130,)
    assert job.status.state is State.CANCELLED and job.status.reason.endswith("which is saved: cancelled by me")


@pytest.mark.parametrize("has_flock", [True, False])
def test_by_hand_there_is_no_launcher_to_end_with(tmp_path: Path, monkeypatch, has_flock: bool) -> None:
    """The script looks for it with `flock`, and where there is none, as on macOS, the job does."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if has_flock else None)
    monkeypatch.delenv(LAUNCHER_LOCK, raising=False)
    assert _launcher_lock() is None
    lock = tmp_path / "lock"
    monkeypatch.setenv(LAUNCHER_LOCK, str(lock))
    with lock.open("w") as file:
        locks.wait_for(file)
        assert _launcher_lock() == lock
    assert _launcher_lock() == (lock if has_flock else None)  # with `flock`, a launcher was there a moment ago


@pytest.mark.slow
def test_it_stops_when_its_launcher_is_gone(make: Make, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        locks.wait_for(file)
        job = make(variables={"FIDDLEHEAD_LAUNCHER_LOCK": str(lock)}).start().at_step(2)
    assert job.end() == (130,)
    assert job.status.state is State.CANCELLED and job.status.reason.endswith("its launcher is gone")


@pytest.mark.parametrize(
    ("state", "attempt", "stopped"), [(State.RUNNING, 1, True), (State.SUCCEEDED, 1, False), (State.RUNNING, 2, False)]
)
def test_a_job_whose_launcher_is_gone_stops_no_other_attempt(
    tmp_path: Path, state: State, attempt: int, stopped: bool
) -> None:
    """As when it is started again by hand, while the process of the first attempt shuts down."""
    run = RunDirectory(tmp_path)
    run.write_status(replace(this_process(1, "local"), state=State.RUNNING))
    lock = tmp_path / "lock"
    with lock.open("w") as file, ThreadPoolExecutor() as pool:
        locks.wait_for(file)
        waiting = pool.submit(_outlive, run, lock)
        reads = Path("/proc/locks")
        wait_until(lambda: re.search(rf"-> FLOCK .* READ .*:{lock.stat().st_ino} ", reads.read_text()) is not None)
        run.write_status(replace(this_process(attempt, "local"), state=state))
        file.close()
        waiting.result(timeout=30)
    assert (run.stop_request() is not None) == stopped


@pytest.mark.slow
@pytest.mark.long
def test_data_loader_processes_do_not_die_of_a_scheduler_s_signal(make: Make, undisturbed: Losses) -> None:
    job = make(num_workers=2)
    job.started_by = subprocess.Popen
    job.start().at_step(3).signal(signal.SIGTERM)
    assert job.end() == (75,), job.run.log.read_text()
    assert "which is saved" in job.status.reason
    assert job.start().end() == (0,)
    assert job.losses == undisturbed(1)


# -- failures


@pytest.mark.slow
def test_three_failures_at_a_step_are_the_end(make: Make) -> None:
    job = make(callbacks=[parts("Fail", step=4, rank=1)], devices=2)
    reason = 'KeyError: "the user\'s mistake"'
    for failures in (1, 2):
        assert job.start().end() == (75,)
        assert (job.status.state, job.status.failures, job.status.failed_step) == (State.INTERRUPTED, failures, 4)
        assert f"rank 1 on {socket.gethostname()}: {reason} ({job.run.logs}/rank-1.txt); failure" in job.status.reason
    assert job.start().end() == (1,)
    assert job.status.state is State.FAILED and job.status.reason.endswith("failure 3 of 3 at step 4")
    assert (job.run.logs / "rank-1.txt").read_text().count("Traceback (most recent call last)") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_leaves_whatever_it_waits_for(make: Make, rank: int) -> None:
    job = make(callbacks=[parts("FailAndStay", step=2, rank=rank)], devices=2, variables={})
    assert job.start().end() == (1,)
    assert job.status.state is State.FAILED and f"rank {rank} on" in job.status.reason
    assert 'KeyError: "the user\'s mistake"' in job.status.reason


@pytest.mark.slow
def test_a_failure_on_one_node_ends_the_other(make: Make) -> None:
    job = make(callbacks=[parts("Fail", step=4, rank=1)], nodes=2)
    assert job.start(*two_nodes()).end() == (75, 1)
    assert "rank 1 on" in job.status.reason and "the user's mistake" in job.status.reason


@pytest.mark.slow
def test_where_nobody_requeues_a_failure_is_the_end(make: Make) -> None:
    job = make(callbacks=[parts("Fail", step=2)], variables={})
    assert job.start().end() == (1,)
    assert job.status.state is State.FAILED and job.status.reason == 'KeyError: "the user\'s mistake"'
    assert "Traceback" in job.run.log.read_text()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that is pending, whose job may be requeued."""
    return make_run(tmp_path / "run")


def test_all_attempts_of_a_job_are_of_its_submission(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIDDLEHEAD_REQUEUES", "9")
    run.write_status(replace(this_process(2, "slurm"), state=State.PENDING, submission=2))
    run.write_job_id("17")
    for attempt in (2, 3):  # queued again by Slurm, under the same number
        assert execute(run, lambda: 1 // 0) == 75
        status = run.written_status()
        assert status and (status.attempt, status.submission) == (attempt, 2)
        assert run.submitted


def going_on(run: RunDirectory) -> State | None:
    """What the status says while the run's process works."""
    seen = []
    execute(run, lambda: seen.append(run.written_status()))
    return seen[0].state if seen else None


@pytest.mark.parametrize("requeued", [True, False])
def test_an_attempt_that_ends_without_a_word_is_a_failure(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], requeued: bool
) -> None:
    if requeued:
        monkeypatch.setenv("FIDDLEHEAD_REQUEUES", "9")
    run.metrics.write_text("step,loss\n1,2.0\n2,1.9\n")
    silent = replace(this_process(5, "slurm"), failures=2, failed_step=2)
    run.write_status(silent)
    if requeued:
        assert execute(run, lambda: pytest.fail("it was tried again")) == 1
        assert (run.written_status() or silent).state is State.FAILED
        assert "attempt 5 ended without a word at step 2, as 3 in a row did" in capsys.readouterr().err
    else:  # someone who starts it by hand knows what they do
        assert going_on(run) is State.RUNNING
    run.metrics.write_text("step,loss\n1,2.0\n2,1.9\n3,1.8\n")  # it came further than before
    run.write_status(silent)
    assert going_on(run) is State.RUNNING


@pytest.mark.parametrize(
    "error", [ConfigError("lr=-1: must be positive"), outcomes.WorkersFailedError("x", 1, final=True)]
)
def test_an_error_that_another_attempt_cannot_fix_is_final(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("FIDDLEHEAD_REQUEUES", "9")

    def fail() -> None:
        raise error

    assert execute(run, fail) == (2 if isinstance(error, ConfigError) else 1)
    status = run.written_status()
    assert status and (status.state, status.failures) == (State.FAILED, 0)


def test_a_full_disk_ends_a_run_in_a_line_and_leaves_no_run_running(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.StringIO):
        """A log on the same disk."""

        write = full  # type: ignore[assignment]

    monkeypatch.setenv("FIDDLEHEAD_REQUEUES", "9")
    run.write_status(replace(this_process(1, "direct"), state=State.PENDING))
    monkeypatch.setattr("fiddlehead.files.atomic.write_atomically", full)
    assert execute(run, full) == 1
    assert capsys.readouterr().err == "error: No space left on device\n"
    status = run.written_status()
    assert status and (status.state, status.exit_code) == (State.FAILED, 1)
    assert status.reason == "No space left on device", "which another attempt would not mend"
    with contextlib.redirect_stderr(Full()), contextlib.redirect_stdout(Full()):
        assert execute(run, full) == 1
        assert execute(run, lambda: 1 // 0) == 75  # which asks for another attempt
    assert going_on(run) is State.RUNNING


# -- before it begins


def test_a_run_that_was_cancelled_while_it_waited_does_not_begin(run: RunDirectory) -> None:
    run.request_stop(StopRequest("cancelled by me"))
    assert execute(run, lambda: pytest.fail("it began")) == 130
    status = run.written_status()
    assert status and status.state is State.CANCELLED and status.reason == "stopped before it began: cancelled by me"


@pytest.mark.parametrize("request_", [StopRequest("cancelled by me"), StopRequest("SIGUSR1", requeue=True)])
def test_what_an_earlier_attempt_was_asked_is_forgotten(run: RunDirectory, request_: StopRequest) -> None:
    run.request_stop(request_)
    if not request_.requeue:  # submitted again since
        run.write_status(replace(this_process(2, "slurm"), state=State.PENDING, submission=2))
    assert execute(run, lambda: None) == 0
    assert run.stop_request() is None


def test_another_process_s_run_is_left_alone(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    def again() -> None:
        assert execute(run, lambda: pytest.fail("two at once")) == 2

    assert execute(run, again) == 0
    assert "is running: another process holds" in capsys.readouterr().err


def test_the_signals_are_given_back(run: RunDirectory) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    for _ in range(2):
        assert execute(run, lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


# -- preflight


def test_a_missing_module_is_named_in_a_moment(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the working directory: what bears a library's name there does not take its place."""
    for name in ("argparse", "csv", "fcntl", "json", "queue", "socket", "torch", "yaml", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    job = make()
    job.started_by = subprocess.Popen
    job.modules = job.run.path  # where there is none
    before = cpu_seconds()
    assert job.start().end() == (2,)
    assert cpu_seconds() - before < 1, "PyTorch was imported"
    reason = job.status.reason
    assert job.status.state is State.FAILED and f"{socket.gethostname()} cannot import job_parts" in reason
    assert sys.executable in reason and "executor.setup_lines" in reason


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("fiddlehead.tasks", True),
        ("fiddlehead.training.callbacks.stop", True),
        ("fiddlehead.training.stopp", False),
        ("fiddlehead.tasks.x", False),
        ("no_such_package.x", False),
    ],
)
def test_modules_are_found_without_importing_them(module: str, found: bool) -> None:
    code = f"import sys; from fiddlehead.run.preflight import *; print(importable({module!r}), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == [str(found), "False"], result.stderr


def test_too_few_gpus_are_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.recipe.write_text("trainer:\n  accelerator: gpu\n  devices: 4\n")
    monkeypatch.setattr(preflight, "gpus", lambda: 1)
    with pytest.raises(ConfigError, match=r"trainer\.devices=4: .* gives this job 1 GPU$"):
        preflight.check(run)
    monkeypatch.setattr(preflight, "gpus", lambda: 4)
    preflight.check(run)
    run.recipe.write_text("trainer:\n  accelerator: gpu\n  devices: auto\n")
    preflight.check(run)
    monkeypatch.setattr(preflight, "gpus", lambda: 0)
    with pytest.raises(ConfigError, match="gives this job 0 GPUs"):
        preflight.check(run)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, 2),
        ("0", 1),
        ("0,1,2", 2),
        ("", 0),
        ("-1", 0),
        ("1,-1,0", 1),
        ("7", 0),
        ("1, 0", 2),
        ("0,0", 0),
        ("NoDevFiles", 0),
        ("GPU-8932f937", 1),
        ("GPU-1,GPU-2,GPU-3", 2),
        ("MIG-1/2/0", 1),
    ],
)
def test_gpus_are_those_that_the_job_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, found: int
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: A'\necho 'GPU 1: A'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(preflight, "DEVICES", tmp_path)
    assert preflight.gpus() == found


def test_another_torch_and_a_full_disk_are_warned_of(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.environment.write_text('{"packages": {"torch": "1.0"}}')
    monkeypatch.setattr(preflight, "MIN_FREE_BYTES", 2**60)
    preflight.check(run)
    printed = capsys.readouterr().out
    assert re.search(r"WARNING: only [\d,]+ MiB are free in", printed)
    assert re.search(r"WARNING: torch is 2\S+ on \S+, and 1\.0 where the run was launched", printed)


# -- which process of how many


def test_a_job_of_another_size_than_its_recipe_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.this_rank(1, 1) == workers.Rank(0, 1, 0, 1, 0)
    assert workers.this_rank(1, 4) is None
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=\d: the job has 1"):
        workers.this_rank(2, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert workers.this_rank(1, 3) == workers.Rank(2, 3, 2, 3, 0)
    with pytest.raises(ConfigError, match="needs 2 processes, and 3 were started"):
        workers.this_rank(1, 2)


def test_two_jobs_on_a_machine_never_meet() -> None:
    """The port of a run on one node is not given away again while its processes start."""
    with socket.socket() as reserved, socket.socket() as listening:
        address = workers.free_address(reserved)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError), socket.socket() as other:
            other.bind(address)
        listening.bind(address)
        listening.listen()


def test_the_first_to_fail_is_the_cause(run: RunDirectory) -> None:
    outcomes.leave(run, "rank 0", 1, "RuntimeError: connection reset")
    outcomes.leave(run, "rank 3", -signal.SIGKILL, "killed by SIGKILL")
    cause = outcomes.conclusion(run)
    assert isinstance(cause, outcomes.WorkersFailedError) and str(cause).startswith("rank 3 on")
    outcomes.leave(run, "rank 0", 75, "stopped after step 7")
    assert isinstance(outcomes.conclusion(run), StopRequested)
    outcomes.forget(run)
    assert outcomes.conclusion(run) is None
