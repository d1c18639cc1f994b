"""Faults on a real cluster: every run ends in the right state, with the right losses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from fiddlehead.checkpoints.folder import newest_first, newest_good
from fiddlehead.launch import watch
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State
from tests.launch.cluster import (
    PACED,
    Cluster,
    ask,
    at_step,
    cluster,
    end_of,
    kill,
    losses,
    output_of,
    starts_of,
    state_of,
    steps_of,
    succeed,
    wait_until,
)

__all__ = ["cluster"]  # the fixture, for pytest to find

pytestmark = pytest.mark.slurm

EVERY_STEP = list(range(1, 31))
"""The steps of a run of which nothing was lost."""
STEP = "optim.lr_scheduler"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """The losses of `paced` on so many processes, on this machine and without a scheduler."""
    known: dict[int, list[tuple[str, ...]]] = {}

    def train(processes: int = 1) -> list[tuple[str, ...]]:
        if processes not in known:
            project = tmp_path_factory.mktemp("undisturbed")
            (project / "recipes").mkdir()
            (project / "recipes" / "paced.py").write_text(PACED)
            quiet = Cluster(project, Path("/nowhere"))
            result = quiet.fiddlehead(
                "pretrain", "-f", "paced", "log.name=whole", "--yes", "executor=local",
                f"executor.ntasks_per_node={processes}", OMP_NUM_THREADS="1",
            )  # fmt: skip
            assert result.returncode == 0, result.stdout + result.stderr
            known[processes] = losses(quiet.run("whole"))
        return known[processes]

    return train


# --- ending badly, at once


def test_a_missing_interpreter_is_said_within_seconds(cluster: Cluster):
    run = cluster.submit("nowhere", "executor.python=/nowhere/python")
    status = end_of(run, 30)
    assert status.state is State.FAILED
    assert "/nowhere/python" in output_of(run) and "executor.python" in output_of(run)
    job = cluster.job(run)
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0"
    began, ended = (datetime.fromisoformat(job[time]) for time in ("StartTime", "EndTime"))
    assert (ended - began).total_seconds() <= 5


@pytest.mark.slow
def test_the_children_of_a_failed_parent_end_cancelled(cluster: Cluster):
    blocker = cluster.block("--nodes=2")
    parent = cluster.submit("parent", "executor.python=/nowhere/python")
    child = cluster.submit("child", "--after", "parent")
    grandchild = cluster.submit("grandchild", "--after", "child")
    assert state_of(grandchild).state is State.PENDING
    ask("scancel", blocker)
    assert end_of(parent).state is State.FAILED
    assert end_of(child).state is State.CANCELLED and end_of(grandchild).state is State.CANCELLED
    assert not child.log.exists() and not grandchild.log.exists()


@pytest.mark.slow
def test_an_exception_is_tried_three_times_at_its_step(cluster: Cluster):
    run = cluster.submit("broken", f"{STEP}.fails_at=5")
    status = end_of(run, 240)
    assert (status.state, status.exit_code) == (State.FAILED, 1)
    assert "step 5 cannot be done" in status.reason
    assert starts_of(run) == 3 and cluster.restarts(run) == 2
    assert run.log.read_text().count("RuntimeError: step 5 cannot be done") >= 3
    assert "Traceback" in run.log.read_text()


# --- cancelling


def test_a_cancelled_pending_job_never_begins(cluster: Cluster):
    blocker = cluster.block("--nodes=2")
    run = cluster.submit("waiting")
    status = state_of(run)
    assert status.state is State.PENDING and status.reason  # Resources, or Priority
    result = cluster.fiddlehead("runs", "cancel", "waiting")
    assert result.returncode == 0, result.stderr
    ask("scancel", blocker)
    assert end_of(run).state is State.CANCELLED
    assert not run.log.exists() and cluster.job(run)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("how", ["runs cancel", "scancel", pytest.param("ctrl-c", marks=pytest.mark.slow)])
def test_a_cancelled_run_has_saved_its_step(cluster: Cluster, how: str):
    arguments = cluster.pretrain("stopped", f"{STEP}.pause=0.5", "checkpoint.every_n_steps=1000")
    detached = [] if how == "ctrl-c" else ["--detach"]
    launcher = subprocess.Popen(
        cluster.command(*arguments, *detached), cwd=cluster.project,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    run = cluster.run("stopped")
    at_step(run, 3)
    if how == "ctrl-c":
        launcher.send_signal(signal.SIGINT)
    elif how == "scancel":
        ask("scancel", run.job_id)
    else:
        assert cluster.fiddlehead("runs", "cancel", "stopped").returncode == 0
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == (130 if how == "ctrl-c" else 0), output
    assert end_of(run, 30).state is State.CANCELLED
    assert [path.name for path in newest_first(run.checkpoints)] == [f"step-{steps_of(run)[-1]:08d}"]
    assert cluster.restarts(run) == 0 and starts_of(run) == 1


# --- going on


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_requeued_by_hand_it_goes_on(cluster: Cluster, undisturbed, launcher: str):
    run = cluster.submit("requeued", f"{STEP}.pause=0.3", "executor.ntasks_per_node=2", f"executor.launcher={launcher}")
    at_step(run, 4)
    ask("scontrol", "requeue", run.job_id)
    assert state_of(run).state in (State.PENDING, State.RUNNING, State.INTERRUPTED)
    succeed(run)
    assert losses(run) == undisturbed(2)
    assert starts_of(run) == 2 and steps_of(run) == EVERY_STEP


@pytest.mark.slow
def test_out_of_time_it_is_requeued_and_goes_on(cluster: Cluster, undisturbed):
    run = cluster.submit("slow", f"{STEP}.pause=1.6", "executor.time=00:01:00", "executor.save_before=5")
    at_step(run, 2)
    began = time.monotonic()
    wait_until(lambda: cluster.restarts(run) >= 1, 120, "the time limit")
    assert time.monotonic() - began < 90
    assert not state_of(run).state.ended
    succeed(run, 300)
    assert losses(run) == undisturbed(1)
    assert steps_of(run) == EVERY_STEP
    assert state_of(run).attempt >= 2


@pytest.mark.slow
def test_preempted_three_times_and_once_out_of_time_over_two_nodes(cluster: Cluster, undisturbed):
    run = cluster.submit(
        "hunted", f"{STEP}.pause=1.8", "log.wandb=true", "executor.env_vars.WANDB_MODE=offline",
        "executor.nodes=2", executor="minute",
    )  # fmt: skip
    for preemption in range(1, 4):
        at_step(run, preemption)
        cluster.preempt(run)
        wait_until(lambda: starts_of(run) == preemption + 1, 60, "the next attempt")  # noqa: B023
    at_step(run, 4)
    # About 26 steps of 1.8 s are left, and less than 50 s for them.
    wait_until(lambda: cluster.restarts(run) >= 4, 120, "the time limit")
    succeed(run, 400)
    assert losses(run) == undisturbed(2)
    assert steps_of(run) == EVERY_STEP  # each saved its last step
    recorded = {path.name.rsplit("-", 1)[1] for path in (run.path / "wandb").glob("offline-run-*")}
    assert recorded == {run.wandb_id}
    # An attempt that is ended while it starts has nothing to record.
    assert 5 <= len(list((run.path / "wandb").glob("offline-run-*"))) <= starts_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_killed_rank_costs_at_most_the_checkpoint_interval(cluster: Cluster, undisturbed, launcher: str):
    run = cluster.submit("killed", f"{STEP}.pause=0.3", "executor.ntasks_per_node=2", f"executor.launcher={launcher}")
    at_step(run, 14)  # the last checkpoint is that of step 10
    (worker,) = trainers(cluster, run, rank=1)
    kill(worker)
    succeed(run)
    assert losses(run) == undisturbed(2)
    assert starts_of(run) == 2
    assert len(steps_of(run)) - len(EVERY_STEP) <= 10


@pytest.mark.slow
def test_a_lost_node_costs_at_most_the_checkpoint_interval(cluster: Cluster, undisturbed):
    run = cluster.submit("lost", f"{STEP}.pause=0.3")
    at_step(run, 14)
    node = cluster.nodes(run)
    cluster.lose(node)
    assert state_of(run).state is State.PENDING
    succeed(run)
    assert cluster.nodes(run) != node
    assert losses(run) == undisturbed(1)
    assert len(steps_of(run)) - len(EVERY_STEP) <= 10


@pytest.mark.slow
def test_a_node_that_only_seems_lost_does_no_harm(cluster: Cluster, undisturbed):
    """Its job goes on there, while Slurm starts another on a node that answers."""
    run = cluster.submit("cut-off", f"{STEP}.pause=0.5")
    at_step(run, 4)
    node = cluster.nodes(run)
    kill(cluster.daemon(f"slurmd.{node}"))
    ask("scontrol", "update", f"nodename={node}", "state=down", "reason=cut off")
    succeed(run)
    assert losses(run) == undisturbed(1)


@pytest.mark.slow
def test_the_controller_restarts_under_a_run_and_its_launcher(cluster: Cluster, undisturbed):
    arguments = cluster.pretrain("patient", f"{STEP}.pause=0.5")
    launcher = subprocess.Popen(
        cluster.command(*arguments), cwd=cluster.project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run = cluster.run("patient")
    at_step(run, 3)
    cluster.stop_controller()
    shown = cluster.fiddlehead("runs", "show", "patient")
    assert shown.returncode == 0 and "RUNNING" in shown.stdout, shown.stdout + shown.stderr
    at_step(run, 10)
    cluster.start_controller()
    output, _ = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, output
    assert state_of(run).state is State.SUCCEEDED and starts_of(run) == 1
    assert losses(run) == undisturbed(1)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(cluster: Cluster, undisturbed, tmp_path: Path):
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], check=True)
    try:
        result = cluster.fiddlehead(
            *cluster.pretrain("full", f"log.dir={mount}", "checkpoint.every_n_steps=1", "checkpoint.keep_last=50")
        )
        assert result.returncode == 1, result.stdout + result.stderr
        run = RunDirectory(mount / "full")
        assert state_of(run).state is State.FAILED
        assert "No space left" in result.stdout + result.stderr
        assert newest_good(run.checkpoints) == newest_first(run.checkpoints)[0]
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        again = cluster.fiddlehead("runs", "rerun", "full", "--dir", str(mount), "--allow", "recipes.paced")
        assert again.returncode == 0, again.stdout + again.stderr
        assert losses(run) == undisturbed(1)
    finally:
        cluster.repair()  # no job shall write there any more
        subprocess.run(["umount", str(mount)], check=True)


# --- several at once


@pytest.mark.slow
def test_two_jobs_on_one_node_do_not_meet(cluster: Cluster, undisturbed):
    runs = [
        cluster.submit(name, f"{STEP}.pause=0.5", "executor.ntasks_per_node=2", "executor.exclude=node2")
        for name in ("one", "other")
    ]
    for run in runs:
        at_step(run, 1)
    assert [cluster.job(run)["JobState"] for run in runs] == ["RUNNING", "RUNNING"]
    for run in runs:
        succeed(run)
        assert losses(run) == undisturbed(2)
        assert starts_of(run) == 1 and cluster.nodes(run) == "node1"


@pytest.mark.slow
def test_thirty_runs_swept_at_once_are_tracked(cluster: Cluster):
    blocker = cluster.block("--nodes=2")
    rates = ",".join(f"{number}e-4" for number in range(1, 31))
    result = cluster.fiddlehead(*cluster.pretrain("swept", "--detach", f"optim.lr={rates}", "trainer.max_steps=2",
                                                  "--sweep", recipe="tiny_test"))  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    runs = [RunDirectory(path.parent) for path in sorted((cluster.project / "runs").glob("swept-*/recipe.yaml"))]
    assert len(runs) == 30
    assert len({run.job_id for run in runs}) == 30
    began = time.monotonic()
    listed = cluster.fiddlehead("runs")
    assert time.monotonic() - began < 2
    assert listed.returncode == 0 and listed.stdout.count("PENDING") == 30, listed.stdout + listed.stderr
    ask("scancel", *(run.job_id for run in runs[:18]))
    ask("scancel", blocker)
    wait_until(lambda: all(status and status.state.ended for status in watch.states(runs)), 300, "the sweep's end")
    assert [state_of(run).state for run in runs] == [State.CANCELLED] * 18 + [State.SUCCEEDED] * 12


# --- states


@pytest.mark.slow
def test_states_of_every_kind_also_without_accounting(cluster: Cluster):
    """The same with `sacct` and without; the tests are run once on either cluster."""
    bad = cluster.submit("bad", "executor.python=/nowhere/python")
    good = cluster.submit("good", "trainer.max_steps=2")
    killed = cluster.submit("killed", f"{STEP}.pause=1", "executor.requeues=0")
    held = cluster.submit("held", "executor.nodes=2", "--after", "killed")
    at_step(killed, 1)
    assert state_of(killed).state is State.RUNNING and state_of(held).state is State.PENDING
    for process in cluster.processes(SLURM_JOB_ID=killed.job_id):
        kill(process)
    found = {run.name: end_of(run).state for run in (good, bad, killed, held)}
    assert found.pop("killed") in (State.DIED, State.FAILED)
    assert found == {"good": State.SUCCEEDED, "bad": State.FAILED, "held": State.CANCELLED}
    listed = cluster.fiddlehead("runs").stdout
    assert "PENDING" not in listed and "RUNNING" not in listed


# --- what reaches a job, and how fast


@pytest.mark.slow
def test_secrets_reach_the_job_and_no_file(cluster: Cluster, tmp_path: Path):
    marks = {name: secrets.token_hex(8) for name in ("WANDB_API_KEY", "HF_TOKEN", "MINE")}
    values = {name: f'it\'s "{mark}" $(id -u)\n`id`' for name, mark in marks.items()}
    run = cluster.submit("quiet", f"{STEP}.pause=0.3", f"{STEP}.shows=MINE", "executor.secrets=[MINE]", **values)
    folders = [run.path, cluster.project, tmp_path / "nemo_run", cluster.folder, Path.home() / ".nemo_run"]
    at_step(run, 1)
    delivered = [file for file in (tmp_path / "secrets").rglob("*") if file.is_file()]
    assert [file.stat().st_mode & 0o777 for file in delivered] == [0o600]
    assert found(marks.values(), folders) == []
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [line for line in lines if any(mark.encode() in line for mark in marks.values())]
    succeed(run)
    assert hashlib.sha256(values["MINE"].encode()).hexdigest() in run.log.read_text()
    # The job's shell, which outlives the run a little, removes them.
    wait_until(lambda: not found(marks.values(), [tmp_path / "secrets"]), 30, "the secrets to be removed")
    assert found(marks.values(), folders) == []


@pytest.mark.slow
def test_a_launch_costs_five_seconds_over_a_bare_sbatch(cluster: Cluster, tmp_path: Path):
    """From the command to the job's first line; importing NeMo-Run is its own."""
    first = tmp_path / "first"
    began = time.time()
    ask("sbatch", f"--output={tmp_path}/bare", f"--wrap=touch {first}")
    wait_until(first.exists, 30, "a bare job")
    bare = first.stat().st_mtime - began
    began = time.time()
    subprocess.run([sys.executable, "-W", "ignore", "-c", "import nemo_run"], check=True)
    imported = time.time() - began
    began = time.time()
    launcher = subprocess.Popen(cluster.command(*cluster.pretrain("timed", "--detach")), cwd=cluster.project)
    log = cluster.run("timed").log
    wait_until(lambda: log.exists() and log.stat().st_size, 60, "the job's first line")
    ours = time.time() - began
    launcher.wait()
    print(f"bare sbatch {bare:.1f} s, import nemo_run {imported:.1f} s, fiddlehead {ours:.1f} s")
    assert ours - imported - bare < 5


def found(marks, folders: list[Path]) -> list[str]:
    """The files that hold any of the marks."""
    options = [option for mark in marks for option in ("-e", mark)]
    existing = [str(folder) for folder in folders if folder.exists()]
    return subprocess.run(["grep", "-rlaF", *options, *existing], capture_output=True, text=True).stdout.splitlines()


def trainers(cluster: Cluster, run: RunDirectory, rank: int) -> list[int]:
    """The processes of a run's rank that train."""
    name = "SLURM_PROCID" if "srun" in json.loads(run.executor.read_text())["launcher"] else "RANK"
    return [
        process
        for process in cluster.processes(SLURM_JOB_ID=run.job_id, **{name: str(rank)})
        if re.search(rb"fiddlehead\.job", Path(f"/proc/{process}/cmdline").read_bytes())
    ]
