"""Real launches on this machine: the job's process, its exit code, its end."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fiddlehead.runs import RunDirectory, State
from fiddlehead.training.checkpoint import newest_first, newest_good

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fiddlehead.cli import main; main()", *arguments]


def pretrain(name: str, *arguments: str) -> list[str]:
    return command("pretrain", "--factory", "tiny_test", f"log.name={name}", "--yes", *arguments)


def run(arguments: list[str], cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)


def losses(run: RunDirectory) -> list[tuple[str, ...]]:
    with run.metrics.open() as file:
        return [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)]


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunDirectory:
    """tiny_test, launched through NeMo-Run, to its end."""
    directory = tmp_path_factory.mktemp("undisturbed")
    result = run(pretrain("whole"), directory)
    assert result.returncode == 0, result.stdout + result.stderr
    return RunDirectory(directory / "runs" / "whole")


def test_a_run_directory_has_everything(undisturbed):
    names = {path.name for path in undisturbed.path.iterdir()}
    expected = {"recipe.yaml", "command", "environment.json", "status", "log.txt", "metrics.csv", "checkpoints"}
    assert expected | {"tokenizer.json"} <= names
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


@pytest.mark.slow
def test_killed_ten_times_it_ends_equal(undisturbed, tmp_path):
    """SIGKILL at random moments, start-up included; then the same command once more."""
    chance = random.Random(0)
    killed = RunDirectory(tmp_path / "runs" / "killed")
    kills = 0
    while kills < 10:
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
    process = subprocess.Popen(
        pretrain("stopped", "trainer.max_steps=100000"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    stopped = RunDirectory(tmp_path / "runs" / "stopped")
    wait_until(lambda: stopped.metrics.exists() and len(stopped.metrics.read_text().splitlines()) > 5)
    began = time.time()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    status = stopped.status()
    assert status and status.state is State.CANCELLED
    assert status.ended and status.ended - began < 5
    last_logged = [row[0] for row in losses(stopped) if row[1]][-1]
    newest = sorted(path.name for path in stopped.checkpoints.glob("step-*"))[-1]
    assert newest == f"step-{int(last_logged):08d}"
    assert f"after step {last_logged}, which is saved" in output


@pytest.mark.slow
def test_detached_it_outlives_the_shell_and_can_be_cancelled(tmp_path):
    began = time.monotonic()
    shell = run(
        ["bash", "-c", 'exec "$@"', "bash", *pretrain("away", "--detach", "trainer.max_steps=100000")], tmp_path
    )
    assert shell.returncode == 0, shell.stderr
    away = RunDirectory(tmp_path / "runs" / "away")
    assert time.monotonic() - began < 60
    wait_until(lambda: len(away.last_metrics()) > 0)
    status = away.status()
    assert status and status.state is State.RUNNING
    refused = run(pretrain("away"), tmp_path)
    assert refused.returncode == 2 and "is running" in refused.stderr
    cancelled = run(command("runs", "cancel", "away"), tmp_path)
    assert cancelled.returncode == 0, cancelled.stderr
    status = away.status()
    assert status and status.state is State.CANCELLED


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
        subprocess.run(["umount", str(mount)], check=True)


def test_what_nemo_run_still_needs_help_with():
    """When one of these fails, NeMo-Run has learned it and the help in launch/local.py can go."""
    probe = (
        "import inspect, nemo_run\n"
        "from nemo_run.run.torchx_backend.schedulers.local import PersistentLocalScheduler\n"
        "assert nemo_run.LocalExecutor not in nemo_run.Experiment._DETACH_SUPPORTED_EXECUTORS\n"
        "assert 'kill' in inspect.getsource(PersistentLocalScheduler.close)\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", probe], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
