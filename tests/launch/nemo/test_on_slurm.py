"""NeMo-Run's SlurmExecutor on a real cluster: taken over, and in NeMo-Run's own experiment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import list_runs
from tests.launch.cluster import Cluster, at_step, cluster, losses, starts_of, succeed, wait_until
from tests.launch.test_faults import undisturbed

__all__ = ["cluster", "undisturbed"]  # the fixtures, for pytest to find

pytestmark = pytest.mark.slurm

Undisturbed = Callable[[int], list[tuple[str, ...]]]

THEIRS = """
import nemo_run as run


def theirs(nodes: int = 1):
    executor = run.SlurmExecutor(
        account="root",
        partition="batch",
        nodes=nodes,
        ntasks_per_node=1,
        tunnel=run.LocalTunnel(job_dir=""),
        time="00:05:00",
        packager=run.GitArchivePackager(),
        env_vars={"OMP_NUM_THREADS": "1"},
        retries=3,
    )
    return executor
"""
"""A user's file, from NeMo-Run's pages."""

SCRIPT = """
import os
import sys

import nemo_run as run
from launch.theirs import theirs
from recipes.paced import paced

if __name__ == "__main__":
    recipe = paced()
    recipe.optim.lr_scheduler.pause = 0.3
    recipe.trainer.accelerator = "cpu"
    executor = theirs()
    executor.packager = run.Packager()
    path = ":".join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    executor.setup_lines = f"export PATH={os.path.dirname(sys.executable)}:$PATH PYTHONPATH={path}"
    run.run(recipe, executor=executor, name="task", detach=True)
"""


def is_requeued_to_the_same_losses(cluster: Cluster, run: RunDirectory, undisturbed: Undisturbed) -> None:
    at_step(run, 3)
    cluster.preempt(run)
    whole = undisturbed(1)  # while the other waits for its turn
    succeed(run)
    assert starts_of(run) == 2
    assert losses(run) == whole


def test_an_executor_that_is_taken_over_is_requeued_to_the_same_losses(
    cluster: Cluster, undisturbed: Undisturbed
) -> None:
    (cluster.project / "launch" / "theirs.py").write_text(THEIRS)
    run = cluster.submit("taken", "optim.lr_scheduler.pause=0.3", executor="theirs")
    is_requeued_to_the_same_losses(cluster, run, undisturbed)
    assert cluster.job(run)["Account"] == "root"


@pytest.mark.slow
def test_a_task_of_an_experiment_is_requeued_to_the_same_losses(
    cluster: Cluster, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cluster.project / "launch" / "theirs.py").write_text(THEIRS)
    (cluster.project / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("NEMORUN_HOME", str(cluster.project / "home"))  # in paths, NeMo-Run rewrites /nemo_run
    result = subprocess.run([sys.executable, "script.py"], cwd=cluster.project, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = cluster.project / "runs"
    wait_until(lambda: runs.exists() and list_runs(runs), 60, "the job to begin")
    (run,) = list_runs(runs)
    wait_until(lambda: run.job_id, 10, "the job's number")
    is_requeued_to_the_same_losses(cluster, run, undisturbed)
