"""Real launches on this machine: the job's process, its exit code, its end."""

from __future__ import annotations

import csv
import gc
import hashlib
import logging
import os
import random
import re
import secrets as random_secrets
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.checkpoints.folder import newest_first, newest_good
from fiddlehead.errors import ConfigError
from fiddlehead.launch import watch
from fiddlehead.launch.local import LocalExecutor, local
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.processes import started as process_started
from fiddlehead.run.status import State, StopRequest, this_process
from tests import warm
from tests.conftest import once

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fiddlehead.cli import main; main()", *arguments]


def pretrain(name: str, *arguments: str) -> list[str]:
    return command("pretrain", "--factory", "tiny_test", f"log.name={name}", "--yes", *arguments)


def run(arguments: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs a command; without `env` it and its jobs are forks, whose processes are not those that were started."""
    env = {**os.environ, **warm.everywhere()} if env is None else env
    return warm.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def losses(run: RunDirectory) -> list[tuple[str, ...]]:
    with run.metrics.open() as file:
        return [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)]


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> RunDirectory:
    """tiny_test, launched through NeMo-Run, to its end."""

    def launch(directory: Path) -> None:
        result = run(pretrain("whole"), directory)
        assert result.returncode == 0, result.stdout + result.stderr

    return RunDirectory(once(tmp_path_factory, "undisturbed", launch) / "runs" / "whole")


def test_a_run_directory_has_everything(undisturbed):
    names = {path.name for path in undisturbed.path.iterdir()}
    expected = {"recipe.yaml", "command", "environment.json", "status", "log.txt", "metrics.csv", "checkpoints"}
    assert expected | {"tokenizer.json", "executor.json", "job.sh", "job_id"} <= names
    assert "code" not in names  # here the job imports the tree itself
    status = undisturbed.status()
    assert status and (status.state, status.exit_code, status.executor) == (State.SUCCEEDED, 0, "local")
    rows = losses(undisturbed)
    first, last = float(rows[0][1]), float([row for row in rows if row[1]][-1][1])
    assert last < first - 1.5  # nats: it learned
    assert "--factory tiny_test" in undisturbed.command.read_text()
    assert "validation: " in undisturbed.log.read_text()


def test_the_output_is_live_and_whole(undisturbed):
    """What the command shows is the job's log; the job itself never imports NeMo-Run."""
    assert len(re.findall(r"^step +\d+/30 ", undisturbed.log.read_text(), re.MULTILINE)) == 30
    probe = "import sys, fiddlehead.job, fiddlehead.tasks, fiddlehead.recipes.tiny; print('nemo_run' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "False"


def test_direct_is_the_same_run(undisturbed, tmp_path):
    result = run(pretrain("direct", "--direct"), tmp_path)
    assert result.returncode == 0, result.stderr
    direct = RunDirectory(tmp_path / "runs" / "direct")
    assert losses(direct) == losses(undisturbed)
    assert "validation: " in direct.log.read_text()


@pytest.mark.slow
def test_two_processes_are_the_same_run(undisturbed, tmp_path):
    result = run(pretrain("two", "executor=local", "executor.ntasks_per_node=2"), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    two = losses(RunDirectory(tmp_path / "runs" / "two"))
    whole = losses(undisturbed)
    assert [row[0] for row in two] == [row[0] for row in whole]
    for ours, theirs in zip(two, whole, strict=True):
        if ours[1]:
            assert float(ours[1]) == pytest.approx(float(theirs[1]), abs=1e-5)
    newest = RunDirectory(tmp_path / "runs" / "two").last_metrics()
    assert 0 <= float(newest["seconds_communication"]) < 1  # of an earlier step than the line's other figures
    assert "seconds_communication" not in undisturbed.last_metrics()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("times", [3, 10])
def test_killed_many_times_it_ends_equal(undisturbed, tmp_path, times):
    """SIGKILL at random moments, start-up included; then the same command once more."""
    chance = random.Random(0)
    killed = RunDirectory(tmp_path / "runs" / "killed")
    kills = 0
    while kills < times:
        # Direct, so that the process that is killed is the one that trains.
        process = subprocess.Popen(
            pretrain("killed", "--direct"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0.5, 4.0))
        else:
            before = killed.metrics.stat().st_size if killed.metrics.exists() else 0
            goal = before + chance.randrange(1, 300)
            while process.poll() is None and not (killed.metrics.exists() and killed.metrics.stat().st_size > goal):
                time.sleep(0.02)
        if process.poll() is not None:  # it was faster than the killer
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        status = killed.status()
        assert status is None or status.state is State.DIED
    assert kills >= 3
    result = run(pretrain("killed", "--direct"), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(killed) == losses(undisturbed)


@pytest.mark.slow
def test_ctrl_c_saves_the_last_step(tmp_path):
    process = warm.Popen(
        pretrain("stopped", "trainer.max_steps=100000"), env={**os.environ, **warm.everywhere()},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    stopped = RunDirectory(tmp_path / "runs" / "stopped")
    wait_until(lambda: stopped.metrics.exists() and len(stopped.metrics.read_text().splitlines()) > 5)
    began = time.time()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    status = stopped.status()
    assert status and status.state is State.CANCELLED
    assert status.ended and status.ended - began < 5
    last_logged = [row[0] for row in losses(stopped) if row[1]][-1]
    newest = sorted(path.name for path in stopped.checkpoints.glob("step-*"))[-1]
    assert newest == f"step-{int(last_logged):08d}"
    assert f"after step {last_logged}, which is saved" in output


@pytest.mark.slow
def test_a_killed_launcher_ends_its_job(tmp_path):
    process = warm.Popen(
        pretrain("orphan", "trainer.max_steps=100000"), env={**os.environ, **warm.everywhere()},
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    orphan = RunDirectory(tmp_path / "runs" / "orphan")
    wait_until(lambda: len(orphan.last_metrics()) > 0)
    process.kill()
    process.wait()
    wait_until(lambda: (status := orphan.status()) and status.state.ended, seconds=10)
    status = orphan.status()
    assert status and status.state is State.CANCELLED and "its launcher is gone" in status.reason
    assert newest_good(orphan.checkpoints) == orphan.checkpoints / f"step-{orphan.last_step():08d}"


@pytest.mark.slow
def test_detached_it_outlives_the_shell_and_can_be_cancelled(tmp_path):
    shell = run(
        ["bash", "-c", 'exec "$@"', "bash", *pretrain("away", "--detach", "trainer.max_steps=100000")], tmp_path,
        dict(os.environ),
    )  # fmt: skip
    assert shell.returncode == 0, shell.stderr
    away = RunDirectory(tmp_path / "runs" / "away")
    (at_once,) = watch.states([away])
    assert at_once and at_once.state in (State.PENDING, State.RUNNING)  # though who wrote PENDING is gone
    wait_until(lambda: len(away.last_metrics()) > 0)
    status = away.status()
    assert status and status.state is State.RUNNING and f"{status.pid}:{status.process_started}" == away.job_id
    refused = run(pretrain("away"), tmp_path)
    assert refused.returncode == 2 and "is running" in refused.stderr
    cancelled = run(command("runs", "cancel", "away"), tmp_path)
    assert cancelled.returncode == 0, cancelled.stderr
    status = away.status()
    assert status and status.state is State.CANCELLED


@pytest.mark.slow
def test_a_run_can_be_repeated_by_hand(undisturbed, tmp_path):
    copy = RunDirectory(tmp_path / "runs" / "again")
    result = run(pretrain("again", "trainer.max_steps=5"), tmp_path)
    assert result.returncode == 0, result.stderr
    by_hand = run(["bash", "runs/again/job.sh"], tmp_path)
    assert (by_hand.returncode, by_hand.stdout) == (0, ""), copy.log.read_text()
    status = copy.status()
    assert status and (status.state, status.attempt) == (State.SUCCEEDED, 2)


@pytest.mark.slow
def test_a_secret_is_in_the_job_and_in_no_file(tmp_path, monkeypatch):
    """Nor is it printed, also where bash is told to print what it does."""
    names = ("WANDB_API_KEY", "HF_TOKEN", "MINE")
    values = {name: random_secrets.token_hex(16) for name in names}
    for name, value in {**values, "NEMORUN_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    probe = "for name in WANDB_API_KEY HF_TOKEN MINE; do printf %s ${!name} | sha256sum; done"
    arguments = [
        "trainer.max_steps=2", "executor=local", "executor.secrets=['MINE']", f"executor.setup_lines={probe!r}",
        "executor.env_vars={'NOTE': 'one two; $(id)'}",
    ]  # fmt: skip
    result = run(pretrain("quiet", *arguments), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    traced = run(["bash", "-xv", "runs/quiet/job.sh"], tmp_path)
    assert traced.returncode == 0
    for value in values.values():
        assert hashlib.sha256(value.encode()).hexdigest() in result.stdout  # it was there
        for text in (result.stdout, result.stderr, traced.stdout, traced.stderr):
            assert value not in text
        for file in tmp_path.rglob("*"):
            assert file.is_dir() or value.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_failing_job_is_a_failing_command(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.py").write_text(
        "from fiddlehead.recipe import Recipe\n"
        "from fiddlehead.recipes.tiny import tiny_test\n"
        "import fiddle as fdl\n"
        "\n"
        "def broken() -> Recipe:\n"
        '    """Fails at the fifth step."""\n'
        "    recipe = tiny_test()\n"
        "    recipe.optim.lr_scheduler = fdl.Config(Explodes)\n"
        "    return recipe\n\n"
        "class Explodes:\n"
        "    min_lr = 0.0\n"
        "    warmup_steps = 0\n"
        "    def __call__(self, step, max_steps, lr):\n"
        "        if step == 5:\n"
        "            raise RuntimeError('the fifth step')\n"
        "        return 1.0\n"
    )
    result = run(command("pretrain", "-f", "broken", "log.name=b", "--yes"), tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = RunDirectory(tmp_path / "runs" / "b")
    status = broken.status()
    assert status and status.state is State.FAILED and "the fifth step" in status.reason
    assert "Traceback" in result.stdout and "the fifth step" in result.stderr
    shown = run(command("runs", "show", "b"), tmp_path)
    assert "FAILED" in shown.stdout and "the fifth step" in shown.stdout


@pytest.mark.slow
def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root, to mount a small tmpfs")
    try:
        result = run(
            pretrain("full", "trainer.max_steps=2000", f"log.dir={mount}", "checkpoint.keep_last=50"), tmp_path
        )
        assert result.returncode == 1, result.stdout + result.stderr
        assert "No space left" in result.stdout + result.stderr
        full = RunDirectory(mount / "full")
        assert not list(full.checkpoints.glob(".writing-*"))
        assert newest_good(full.checkpoints) == newest_first(full.checkpoints)[0]
    finally:
        # What forked the launcher may hold the folder a moment longer.
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


# -- the executor alone, with a script in place of the job's


@pytest.fixture
def pending(working_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that is about to be submitted, by a launcher that is gone since."""
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    run = RunDirectory(tmp_path / "runs" / "a b")
    run.path.mkdir(parents=True)
    run.command.write_text("fiddlehead pretrain\n")
    gone = replace(this_process(1, "local"), state=State.PENDING, pid=2**22 + 1)
    run.write_status(gone)
    return run


def submitted(run: RunDirectory, script: str) -> State:
    """Submits a script and returns the state that the run has then."""
    run.script.write_text(script)
    with warnings.catch_warnings(action="ignore"):  # what NeMo-Run imports warns of itself
        (run.path / "job_id").write_text(LocalExecutor().submit(run))
    return state(run)


def state(run: RunDirectory) -> State:
    (status,) = LocalExecutor().states([run])
    assert status
    return status.state


def test_a_job_that_has_not_begun_is_pending_and_can_be_killed(pending):
    began = time.monotonic()
    assert state(pending) is State.DIED
    assert submitted(pending, "sleep 1000 & echo $! > worker; wait") is State.PENDING
    assert time.monotonic() - began < 30  # most of it is NeMo-Run's import
    wait_until(lambda: Path("worker").exists() and Path("worker").read_text())
    worker = Path("/proc") / Path("worker").read_text().strip()
    assert worker.exists()
    LocalExecutor().kill(pending)
    wait_until(lambda: state(pending) is State.DIED, seconds=5)
    wait_until(lambda: not worker.exists() or " Z " in (worker / "stat").read_text(), seconds=5)
    LocalExecutor().kill(pending)  # again is not an error


@pytest.mark.parametrize("system", ["linux", "a_mac"])
def test_a_job_that_is_slow_to_become_its_program_has_not_died(pending, system, request):
    """On a busy machine a shell takes long to become the next one, or Python; what it is called says nothing."""
    if system != "linux":
        request.getfixturevalue(system)
        pending.write_status(replace(this_process(1, "local"), state=State.PENDING, pid=2**22 + 1))
    assert submitted(pending, "sleep 0.1; exec bash -c 'sleep 0.1; touch become; exec sleep 1000'") is State.PENDING
    while not Path("become").exists():
        assert state(pending) is State.PENDING
    time.sleep(0.05)
    assert state(pending) is State.PENDING
    LocalExecutor().kill(pending)
    wait_until(lambda: state(pending) is State.DIED, seconds=5)


def test_a_launcher_that_hands_over_and_leaves_while_it_is_looked_at_has_not_died(pending, monkeypatch):
    looked = RunDirectory.status
    began = process_started(os.getpid())

    def hand_over(self: RunDirectory):
        (pending.path / "job_id").write_text(f"{os.getpid()}:{began}")
        return looked(self)

    monkeypatch.setattr(RunDirectory, "status", hand_over)
    assert state(pending) is State.PENDING


@pytest.mark.parametrize("job", ["", "17", "17:", "a:b", "17:18:19", "99999999999999999999:1"])
def test_an_invalid_id_is_not_a_job(pending, job):
    (pending.path / "job_id").write_text(job)
    assert state(pending) is State.DIED


def test_a_script_that_finds_no_interpreter_has_failed(pending):
    submitted(pending, f"echo 'error: executor.python: none' >> {shlex.quote(str(pending.log))}; exit 2")
    wait_until(lambda: state(pending).ended, seconds=5)
    (status,) = LocalExecutor().states([pending])
    assert status and (status.state, status.exit_code) == (State.FAILED, 2)
    assert status.reason == "executor.python: none"


def test_the_loggers_of_the_program_that_launches_stay_as_they_are(pending):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    for _ in range(2):
        submitted(pending, "exit 0")
        gc.collect()  # NeMo-Run's experiment takes a handler with it
        assert (root.handlers, root.level) == before


def test_cancelled_before_it_began(pending):
    submitted(pending, "exit 130")
    pending.request_stop(StopRequest("runs cancel"))
    wait_until(lambda: state(pending) is State.CANCELLED, seconds=5)


def test_an_earlier_attempts_process_is_not_this_ones(pending):
    submitted(pending, "exit 0")
    wait_until(lambda: state(pending) is State.DIED, seconds=5)
    # This launcher is about to submit.
    pending.write_status(replace(this_process(2, "local"), state=State.PENDING, submission=2))
    assert state(pending) is State.PENDING


def test_a_run_of_another_machine_is_not_killed(pending):
    pending.write_status(replace(this_process(1, "local"), host="elsewhere", machine="another boot"))
    assert state(pending) is State.RUNNING
    with pytest.raises(ConfigError, match="is on elsewhere"):
        LocalExecutor().kill(pending)


def test_impossible_settings_are_refused(pending):
    with pytest.raises(ConfigError, match="nodes=2"):
        LocalExecutor(nodes=2)
    with pytest.raises(ConfigError, match="starts a job at once"):
        LocalExecutor().submit(pending, after=["1"])
    with pytest.raises(ConfigError, match=r"executor\.python='/no/python': there is no such program"):
        local(python="/no/python").check(pending)
    local(python="/no/python", setup_lines="module load python").check(pending)  # which may bring it
    local().check(pending)
