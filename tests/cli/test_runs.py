"""`fiddlehead runs`, on run directories that the tests write as executors would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.prediction import Prediction
from fiddlehead.run.status import State, Status
from tests import warm
from tests.conftest import cpu_seconds

Command = Callable[..., subprocess.CompletedProcess[str]]

LOG = """\
=== started 2026-01-01T10:00:00+0000 on n1 (slurm job 7)
first attempt
=== started 2026-01-01T11:00:00+0000 on n2 (slurm job 7, restart 1)
second attempt
"""
RANK_1 = """\
=== started 2026-01-01T10:00:01+0000 on n1 (rank 1 of 2, slurm job 7)
the first's partner
=== started 2026-01-01T11:00:01+0000 on n2 (rank 1 of 2, slurm job 7, restart 1)
the second's partner
"""


@pytest.fixture
def runs(tmp_path: Path) -> Command:
    """The command, in a folder of its own."""

    def command(*arguments: str, start: Command = warm.run, **environment: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from fiddlehead.cli import main; main()", "runs", *arguments]
        without = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        return start(
            line, cwd=tmp_path, env={**without, "HOME": str(tmp_path), **environment}, capture_output=True, text=True
        )

    return command


def made(folder: Path, name: str, state: State = State.SUCCEEDED, **status: object) -> RunDirectory:
    """A run directory, as if a job had been there."""
    run = RunDirectory(folder / "runs" / name)
    run.logs.mkdir(parents=True)
    run.recipe.write_text("")
    run.command.write_text("fiddlehead pretrain\n")
    settings = {"ended": time.time() if state.ended else None, "host": socket.gethostname(), "pid": 1, **status}
    run.write_status(Status(state, started=time.time() - 60, **settings))  # type: ignore[arg-type]
    run.metrics.write_text("step,loss,tokens_per_s\n1,5.5,10\n2,4.25,1000\n")
    return run


def test_a_log_is_that_of_the_newest_attempt(tmp_path: Path, runs: Command):
    run = made(tmp_path, "a", attempt=2)
    run.log.write_text(LOG)
    (run.logs / "rank-1.txt").write_text(RANK_1)
    assert runs("logs", "a").stdout.splitlines()[1:] == ["second attempt"]
    assert runs("logs", "a", "--attempt", "1").stdout.splitlines()[1:] == ["first attempt"]
    assert runs("logs", "a", "--attempt", "all").stdout == LOG
    assert runs("logs", "a", "--rank", "1").stdout.splitlines()[1:] == ["the second's partner"]
    both = runs("logs", "a", "--rank", "all").stdout
    assert "[rank 0] second attempt\n" in both and "[rank 1] the second's partner\n" in both
    assert "first" not in both
    followed = runs("logs", "a", "-f")
    assert followed.stdout.splitlines()[1:] == ["second attempt"]


def test_a_run_in_wandb_is_shown_with_its_link(tmp_path: Path, runs: Command):
    made(tmp_path, "a").write_wandb_url("https://wandb.ai/moss/ferns/runs/1234")
    assert "https://wandb.ai/moss/ferns/runs/1234" in runs("show", "a").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["logs", "a", "--rank", "5"], "--rank 5"),
        (["logs", "a", "--rank", "x"], "--rank x: must be a number or all"),
        (["logs", "a", "--attempt", "9"], "--attempt 9"),
        (["clean"], "nothing says which"),
        (["clean", "--older-than", "7x"], "--older-than 7x"),
        (["clean", "--state", "RUNNING"], "--state='RUNNING': unknown state 'RUNNING'; allowed: "),
        (["cancel", "a"], "not running: SUCCEEDED"),
        (["sweep", "b"], "unknown sweep 'b'"),
    ],
)
def test_mistakes_are_said(tmp_path: Path, runs: Command, arguments: list[str], said: str):
    made(tmp_path, "a").log.write_text(LOG)
    result = runs(*arguments)
    assert result.returncode == 2 and said in result.stderr, result.stdout + result.stderr


def test_json_has_everything(tmp_path: Path, runs: Command):
    run = made(tmp_path, "a", State.FAILED, reason="it broke", exit_code=3)
    run.recipe.write_text("optim:\n  lr: 0.001\n")
    run.metrics.write_text("step,loss,lr\n1,5.5,nan\n2,4.25,nan\n")
    (found,) = json.loads(runs("--json").stdout)
    assert (found["name"], found["state"], found["reason"], found["exit_code"]) == ("a", "FAILED", "it broke", 3)
    assert found["metrics"] == {"step": 2, "loss": 4.25, "lr": None}
    assert found["recipe"] == {"optim.lr": 0.001}


def test_show_says_where_the_time_of_a_step_goes(tmp_path: Path, runs: Command):
    run = made(tmp_path, "a")
    assert "a step" not in runs("show", "a").stdout  # a run of before there were such columns
    phases = "seconds_per_step,seconds_data,seconds_forward,seconds_backward,seconds_communication,seconds_optimizer"
    run.metrics.write_text(f"step,mfu,mfu_full,{phases}\n1,0.4,0.5,0.2,0.02,0.05,0.1,0.01,0.02\n")
    shown = {line.strip().split("  ")[0]: line.split() for line in runs("show", "a").stdout.splitlines()}
    assert shown["mfu"][-1] == "0.4" and shown["mfu_full"][-1] == "0.5"
    assert shown["a step"][-2:] == ["200.0", "ms"]
    assert shown["backward"][1:] == ["100.0", "ms", "50%", "#" * 20]
    assert shown["of it waiting for gradients"][-4:] == ["10.0", "ms", "5%", "~~"]
    assert shown["the rest"][2:] == ["10.0", "ms", "5%", "##"]


def test_show_has_the_plan_beside_what_was_measured(tmp_path: Path, runs: Command):
    run = made(tmp_path, "a")
    assert "planned" not in runs("show", "a").stdout
    on_a_cpu = Prediction(gpus=1, max_steps=10, tokens_per_step=64)
    run.write_prediction(on_a_cpu)
    assert "planned" not in runs("show", "a").stdout
    known = {"memory_gib": 40.0, "tokens_per_s": 64 / 0.2, "seconds_per_step": 0.2, "gpu": "h100"}
    run.write_prediction(replace(on_a_cpu, max_steps=36_010, **known))
    run.metrics.write_text("step,tokens_per_s,seconds_per_step,memory_gib\n10,256,0.25,42\n")
    shown = {line.strip().split("  ")[0]: line.split() for line in runs("show", "a").stdout.splitlines()}
    assert "plan for 1 x h100" in shown
    assert shown["memory"][1:] == ["40.00", "GiB", "42.00", "GiB", "+5.0%"]
    assert shown["tokens/s"][1:] == ["320", "256", "-20.0%"]
    assert shown["hours left"][2:] == ["2.00", "2.50", "+25.0%"]
    run.metrics.unlink()  # it has not begun
    shown = {line.strip().split("  ")[0]: line.split() for line in runs("show", "a").stdout.splitlines()}
    assert shown["memory"][1:] == ["40.00", "GiB"]
    (found,) = json.loads(runs("--json").stdout)
    assert found["plan"]["memory_gib"] == 40.0


def test_clean_deletes_what_has_ended_and_nothing_else(tmp_path: Path, runs: Command):
    kept = made(tmp_path, "going", State.RUNNING, host="elsewhere")
    bad = made(tmp_path, "bad", State.FAILED)
    good = made(tmp_path, "good")
    assert "no such runs" in runs("clean", "--older-than", "1h", "--yes").stdout
    assert runs("clean", "--state", "FAILED", "--yes").returncode == 0
    assert (bad.path.exists(), good.path.exists(), kept.path.exists()) == (False, True, True)
    refused = runs("clean", "going", "--yes")
    assert refused.returncode == 2 and "is going on" in refused.stderr
    assert runs("clean", "--older-than", "0m", "--yes").returncode == 0
    assert (good.path.exists(), kept.path.exists()) == (False, True)


def test_sync_wants_a_key_only_if_there_is_something_to_send(tmp_path: Path, runs: Command):
    run = made(tmp_path, "a")
    assert "nothing was recorded offline" in runs("sync").stdout
    (run.path / "wandb" / "offline-run-20260101_100000-abc").mkdir(parents=True)
    result = runs("sync", NETRC=str(tmp_path / "netrc"))
    assert result.returncode == 2 and "no API key" in result.stderr


def test_thirty_runs_are_listed_in_two_seconds_of_work(tmp_path: Path, runs: Command):
    for number in range(30):
        run = made(tmp_path, f"run-{number}", executor="slurm")
        run.executor.write_text(json.dumps({"kind": "slurm"}))
        (run.path / "job_id").write_text(f"{number}\n")
    before = cpu_seconds()
    result = runs(start=subprocess.run)
    assert result.returncode == 0 and result.stdout.count("SUCCEEDED") == 30
    assert cpu_seconds() - before < 2
