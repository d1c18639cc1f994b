"""A recipe in an experiment of NeMo-Run's is a run of ours."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from nemo_run.run import job

from fiddlehead.errors import ConfigError
from fiddlehead.launch import nemo, watch
from fiddlehead.launch.nemo.experiments import accept_recipes, task_for_job
from fiddlehead.launch.nemo.plugins import ConfigValidationPlugin, DespitePlugin, PreemptionPlugin, WandbPlugin
from fiddlehead.launch.nemo.runner import run_in_job
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.llama import llama3_8b
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run import RunDirectory, State
from fiddlehead.run.names import list_runs
from fiddlehead.training import Parallel
from tests import warm
from tests.recipe_parts import Optim, report

STEPS = "in three steps"


@dataclass
class Shorter(run.Plugin):
    """A user's plugin."""

    steps: int = 3

    def setup(self, task: Any, executor: Any) -> None:
        task.trainer.max_steps = self.steps
        executor.env_vars["NOTE"] = STEPS


@pytest.fixture
def logging_kept() -> Iterator[None]:
    level = logging.getLogger().level
    with nemo._logging_kept():
        yield
    assert logging.getLogger().level == level


def written(experiment: run.Experiment, name: str) -> fdl.Buildable:
    """What NeMo-Run's runner is given for a task."""
    (file,) = Path(experiment._exp_dir).rglob(f"{name}_fn_or_script")
    return ZlibJSONSerializer().deserialize(file.read_text())


def dry_run(folder: Path, *tasks: Any, **options: Any) -> run.Experiment:
    made = run.Experiment("exp", base_dir=str(folder), log_level="ERROR", clean_mode=True)
    with made:
        for task in tasks:
            made.add(task, **options)
        made.dryrun(log=False, delete_exp_dir=False)
    return made


def test_the_job_of_a_task_is_a_run_with_what_its_plugins_have_set(working_directory: Path, logging_kept: None) -> None:
    recipe = tiny_test()
    plugins = [Shorter(), PreemptionPlugin(), WandbPlugin(), ConfigValidationPlugin()]
    made = dry_run(working_directory, recipe, name="task", plugins=plugins)
    task = written(made, "task")
    assert task.__fn_or_cls__ is run_in_job
    assert Recipe.from_yaml(task.recipe).trainer.max_steps == 3 and recipe.trainer.max_steps == 30
    assert Recipe.from_yaml(task.recipe).log.wandb and not recipe.log.wandb
    assert task.folder == str(working_directory / "runs")
    assert task.name == f"task_{made._id.rpartition('_')[2]}"
    named = tiny_test()
    named.log.name = "named"
    assert written(dry_run(working_directory / "2", [named, recipe], name="group"), "group-0").name == "named"


def test_a_task_is_planned_when_it_is_added(working_directory: Path, logging_kept: None) -> None:
    wrong, other = tiny_test(), tiny_test()
    wrong.data.paths = other.data.paths = "/nowhere"
    other.trainer.strategy = fdl.Config(Parallel, tensor_parallel=3)
    two = run.LocalExecutor(launcher="torchrun", ntasks_per_node=2)
    large = llama3_8b()
    large.trainer.devices, large.trainer.strategy = 1, "auto"
    h100 = run.SlurmExecutor(account="me", container_image="image", gres="gpu:h100:1", gpus_per_node=1)
    made = run.Experiment("exp", base_dir=str(working_directory), log_level="ERROR", clean_mode=True)
    with made:
        with pytest.raises(ConfigError, match=r"^data.paths='/nowhere': .* there is no such folder"):
            made.add(wrong, executor=run.LocalExecutor(), name="first")
        assert not made.jobs
        made.add(tiny_test(), executor=run.LocalExecutor(), name="first")
        made.add(wrong, executor=run.LocalExecutor(), name="second")  # whose data the first one may make
        with pytest.raises(ConfigError, match=r"^trainer.strategy.tensor_parallel=3: "):
            made.add([tiny_test(), other], executor=[run.LocalExecutor(), two], name="third")
        other.trainer.num_nodes = 2
        with pytest.raises(ConfigError, match=r"^trainer.num_nodes=2: LocalExecutor starts one process; several"):
            made.add(other, executor=run.LocalExecutor(), name="nodes")
        with pytest.raises(ConfigError, match=r"the plan does not fit: it needs .* GiB of a GPU") as error:
            made.add(large, executor=h100, name="large")
        assert "DespitePlugin(despite=['memory'])" in str(error.value)
        made.add(large, executor=h100, name="large", plugins=[DespitePlugin(despite=["memory"])])
        assert [job.id for job in made.jobs] == ["first", "second", "large"]


def test_other_tasks_are_left_alone(working_directory: Path, logging_kept: None) -> None:
    accept_recipes()
    made = dry_run(working_directory, Recipe(report, optim=fdl.Config(Optim, lr=0.25), out="out"), name="other")
    assert written(made, "other").__fn_or_cls__ is report


def test_containers_see_the_folder_of_runs(working_directory: Path) -> None:
    runs = str(working_directory / "runs")
    executors = [
        run.DockerExecutor(container_image="image"),
        run.DockerExecutor(container_image="image", volumes=[f"/data:{working_directory}:ro"]),
        run.SlurmExecutor(account="me", container_image="image"),
        run.SlurmExecutor(account="me"),
    ]
    for executor in executors * 2:  # NeMo-Run writes a task down twice
        task_for_job(tiny_test(), "task", executor)
    assert [getattr(each, "volumes", None) or getattr(each, "container_mounts", None) for each in executors] == [
        [f"{runs}:{runs}"], [f"/data:{working_directory}:ro"], [f"{runs}:{runs}"], [],
    ]  # fmt: skip


def test_the_settings_of_a_slurm_job_go_with_it_so_that_its_state_is_slurm_s(working_directory: Path) -> None:
    executors = [
        run.SlurmExecutor(account="me", partition="batch"),
        run.SlurmExecutor(account="me", memory_measure=True),
        run.LocalExecutor(),
    ]
    texts = [task_for_job(tiny_test(), "task", executor).executor for executor in executors]
    assert json.loads(texts[0])["partition"] == "batch" and texts[1:] == ["", ""]


def test_nemo_run_still_writes_tasks_down_by_this_name() -> None:
    """Otherwise a recipe would be called by NeMo-Run's runner, without a run directory."""
    assert "package" in job.Job.prepare.__code__.co_names and "package" in job.JobGroup.prepare.__code__.co_names


def in_job(recipe: Recipe, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls what NeMo-Run's runner calls, in a process of its own."""
    arguments = {"recipe": recipe.to_yaml(), "folder": "runs", "name": name}
    program = f"from fiddlehead.launch.nemo.runner import run_in_job; run_in_job(**{arguments!r})"
    return warm.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
    )


def test_a_job_has_a_run_directory_a_state_and_a_log(working_directory: Path) -> None:
    recipe = tiny_test()
    recipe.trainer.max_steps = 2
    result = in_job(recipe, "first")
    assert result.returncode == 0, result.stderr
    (made,) = list_runs()
    (status,) = watch.states([made])
    assert made.name == "first" and status and status.state is State.SUCCEEDED
    assert watch.where(made, status).startswith("nemo_run on ")
    assert "validation: " in result.stdout and "validation: " in made.log.read_text()
    assert made.log.read_text().startswith("=== started ") and "run_in_job" not in made.log.read_text()
    assert Recipe.load(made.recipe).log.name == "first"


def test_a_job_that_cannot_run_says_so_in_its_state_and_its_exit_code(working_directory: Path) -> None:
    recipe = tiny_test()
    recipe.data.paths = "/nowhere"
    result = in_job(recipe, "wrong")
    (made,) = list_runs()
    (status,) = watch.states([made])
    assert result.returncode == 2 and status and (status.state, status.exit_code) == (State.FAILED, 2)
    assert "/nowhere" in status.reason and "Traceback" not in result.stderr


def test_a_recipe_that_is_built_and_called_is_a_run(working_directory: Path) -> None:
    recipe = tiny_test()
    recipe.trainer.max_steps = 1
    recipe.log.name = "called"
    run.run(recipe)
    status = RunDirectory(working_directory / "runs" / "called").status()
    assert status and status.state is State.SUCCEEDED


SCRIPT = """
import os
import nemo_run as run
from fiddlehead.recipes.tiny import tiny_test


def recipe(name, steps=2):
    made = tiny_test()
    made.trainer.max_steps, made.log.name, made.trainer.accelerator = steps, name, "cpu"
    return made


if __name__ == "__main__":
    executor = run.LocalExecutor(env_vars={"PYTHONPATH": os.environ["PYTHONPATH"]})
    both = executor.clone()
    both.launcher, both.ntasks_per_node = "torchrun", 2
    two = recipe("two")
    two.trainer.devices = 2
    with run.Experiment("exp", executor=executor) as experiment:
        first = experiment.add(recipe("first"), name="first")
        experiment.add(two, executor=both, name="two")
        experiment.add(recipe("first", steps=4), name="after", dependencies=[first])
        experiment.run()
"""


@pytest.mark.slow
@pytest.mark.long
def test_tasks_at_the_same_time_and_one_after_the_other_are_runs(working_directory: Path, tmp_path: Path) -> None:
    Path("script.py").write_text(SCRIPT)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "NEMORUN_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "ignore"}
    environment.setdefault("PYTHONPATH", "")
    result = subprocess.run([sys.executable, "script.py"], env=environment, capture_output=True, text=True)
    states = {each.name: status.state for each in list_runs() if (status := each.status())}
    assert states == dict.fromkeys(("first", "two"), State.SUCCEEDED), result.stdout + result.stderr
    first = RunDirectory(working_directory / "runs" / "first")
    status = first.status()
    assert first.last_step() == 4 and status and status.attempt == 2
