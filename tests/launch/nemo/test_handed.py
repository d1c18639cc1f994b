"""An executor that is not taken over is handed to NeMo-Run as it is, and the run is still ours."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import nemo, watch
from fiddlehead.launch.nemo import handed
from fiddlehead.launch.nemo.handed import HandedExecutor
from fiddlehead.recipe import Recipe, trust
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run import RunDirectory, State
from fiddlehead.run.status import this_process
from tests import warm


@dataclass(kw_only=True)
class Mine(run.LocalExecutor):
    """A user's own executor, which runs on this machine."""

    password: str = "hidden"


@dataclass(kw_only=True)
class Unknown(run.Executor):
    """An executor for which NeMo-Run has no scheduler."""

    def assign(self, exp_id: str, exp_dir: str, task_id: str, task_dir: str) -> None:
        self.experiment_id, self.job_dir = exp_id, str(Path(exp_dir) / task_dir)


def test_a_subclass_is_handed_over_and_its_run_is_like_any_other(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path_factory.mktemp("nemo_run")))
    for name, value in warm.everywhere().items():
        monkeypatch.setenv(name, value)
    recipe = tiny_test()
    recipe.trainer.max_steps, recipe.log.name = 2, "mine"
    made = recipe.launch(Mine(env_vars={"NOTE": "kept"}))
    (status,) = watch.states([made])
    assert status and (status.state, status.executor) == (State.SUCCEEDED, "nemo_run")
    assert (made.code).is_dir() and "validation: " in made.log.read_text()
    assert watch.where(made, status).startswith(f"nemo_run {made.job_id} on ")
    assert "hidden" not in made.executor.read_text()
    executor = watch.load_executor(made)
    assert isinstance(executor, HandedExecutor) and executor.name.endswith("test_handed.Mine")
    monkeypatch.setattr(nemo, "_experiments", [])
    found = nemo.experiment_of(made.job_id)  # as another process finds it
    assert found.status(return_dict=True)["job"]["executor"] == "Mine"
    assert nemo.experiment_of("../secret_1") is None and nemo.experiment_of("nobody_1") is None
    with pytest.raises(ConfigError, match="is not saved with the run; start it again"):
        recipe.launch(executor)


@pytest.fixture
def pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that this user has handed over, and that has not begun."""
    made = RunDirectory(tmp_path / "runs" / "a")
    made.path.mkdir(parents=True)
    made.recipe.touch()
    made.write_status(replace(this_process(1, "nemo_run"), state=State.PENDING, pid=2**22 + 1, submission=1))
    HandedExecutor(name="Theirs").save(made)
    made.write_job_id("a_1")
    trust.remember(made, [])
    return made


def answers(monkeypatch: pytest.MonkeyPatch, state: str) -> list[str]:
    """Makes NeMo-Run say this of each job; returns what it is asked for."""
    asked: list[str] = []

    class Experiment:
        def __init__(self, name: str) -> None:
            asked.append(name)

        def status(self, return_dict: bool) -> dict[str, dict[str, str]]:
            return {"job": {"status": state}}

        def cancel(self, job: str) -> None:
            asked.append(f"cancel {job}")

    monkeypatch.setattr(handed, "experiment_of", Experiment)
    return asked


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("SUBMITTED", State.PENDING), ("PENDING", State.PENDING), ("RUNNING", State.RUNNING),
        ("SUCCEEDED", State.SUCCEEDED), ("FAILED", State.DIED), ("CANCELLED", State.CANCELLED),
        ("UNKNOWN", State.DIED),  # as the process that has launched it is gone
    ],
)  # fmt: skip
def test_the_state_of_a_run_that_has_not_begun_is_nemo_run_s(
    said: str, state: State, pending: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, said)
    (status,) = watch.states([pending])
    assert status and status.state is state and asked == ["a_1"]


def test_the_last_word_of_the_run_itself_counts(pending: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "RUNNING")
    pending.write_status(replace(this_process(1, "nemo_run"), submission=1))
    (status,) = watch.states([pending])
    assert status and status.state is State.RUNNING
    pending.write_status(replace(status, pid=2**22 + 1))
    (status,) = watch.states([pending])
    assert status and status.state is State.DIED
    pending.write_status(replace(status, state=State.SUCCEEDED))
    assert watch.states([pending])[0] == replace(status, state=State.SUCCEEDED)


def test_a_run_of_somebody_else_s_is_not_looked_up(pending: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, "RUNNING")
    trust.forget(pending)
    watch.states([pending])
    watch.kill(pending)
    assert not asked


def test_a_run_is_cancelled_in_its_experiment(pending: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, "PENDING")
    watch.kill(pending)
    assert asked == ["a_1", "cancel job"]


def submit(executor: Any, run: RunDirectory) -> str:
    with pytest.raises(ConfigError) as error:
        HandedExecutor.of_nemo_run(executor).submit(run)
    return str(error.value)


def test_what_cannot_be_handed_over_is_refused(pending: RunDirectory) -> None:
    assert submit(Unknown(), pending).startswith("executor='Unknown': NeMo-Run has no scheduler for it")
    with pytest.raises(ConfigError, match=r"dependencies of a run\.Experiment"):
        HandedExecutor.of_nemo_run(Mine()).submit(pending, after=["b_2"])


def test_processes_follow_the_recipe_unless_the_executor_has_several() -> None:
    assert [HandedExecutor.of_nemo_run(Mine(ntasks_per_node=count)).ntasks_per_node for count in (1, 3)] == [0, 3]
    launched = HandedExecutor.of_nemo_run(Mine(launcher="torchrun", ntasks_per_node=2))
    assert launched.theirs.launcher is None and launched.ntasks_per_node == 2
    assert "theirs" not in json.dumps(launched.to_dict())


@pytest.mark.slow
@pytest.mark.long
def test_on_several_nodes_nemo_run_s_torchrun_starts_the_processes(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a cloud runs the command of NeMo-Run's torchrun component on two nodes, which are this machine."""
    nodes: list[subprocess.Popen[bytes]] = []

    def start(title: str, executor: Any, script: str) -> str:
        assert isinstance(executor.get_launcher(), run.Torchrun)
        file = working_directory / "lines.sh"
        file.write_text("#!/usr/bin/bash\n" + script)
        file.chmod(0o700)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", address]
        command += ["--rdzv-id", "1", "--nnodes", "2", "--nproc-per-node", "1"]
        for node in ("0", "1"):
            nodes.append(subprocess.Popen([*command, "--node-rank", node, "--no-python", str(file)]))
        return "exp_1"

    monkeypatch.setattr(handed, "hand_over", start)
    recipe = tiny_test()
    recipe.trainer.max_steps, recipe.log.name = 2, "two"
    made = recipe.launch(Mine(nodes=2))
    assert [node.wait(60) for node in nodes] == [0, 0]
    assert "validation: " in made.log.read_text() and (made.logs / "rank-1.txt").exists()
    assert Recipe.load(made.recipe).trainer.num_nodes == 2
    alone = tiny_test()
    alone.trainer.max_steps, alone.log.name = 2, "alone"
    one = alone.launch()
    first, second = (float(each.last_metrics()["loss"]) for each in (made, one))
    assert first == pytest.approx(second, rel=1e-5)
