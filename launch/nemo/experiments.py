"""Recipes in NeMo-Run's own experiments: `run.run(recipe, executor=...)`, `experiment.add(recipe, ...)`.

NeMo-Run's runner would call the recipe's task with objects that it has built, without a run directory. So
`accept_recipes` makes NeMo-Run write something else down for the job: `nemo.runner.run_in_job`, with the recipe as its
argument, and plan the recipe when it is added.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError
from fiddlehead.files.paths import user_path
from fiddlehead.launch.nemo.planned import refuse_unfit
from fiddlehead.launch.nemo.settings import kind_of
from fiddlehead.launch.slurm import SlurmExecutor
from fiddlehead.recipe import Recipe
from fiddlehead.run.directory import PRIVATE

_theirs: Callable[..., Any] | None = None
"""NeMo-Run's function that writes a task down for its job."""


def accept_recipes() -> None:
    """From now on, plans each recipe that is added to an experiment, and gives it a run directory.

    NeMo-Run must be loaded.
    """
    global _theirs
    job: Any = sys.modules.get("nemo_run.run.job")
    if job is not None and job.package is not _package:
        _theirs, job.package = job.package, _package
    experiment = getattr(sys.modules.get("nemo_run.run.experiment"), "Experiment", None)
    if experiment is not None and not hasattr(experiment.add, "__wrapped__"):
        experiment.add = _planned(experiment.add)


def _planned(theirs: Callable[..., str]) -> Callable[..., str]:
    """As NeMo-Run's `Experiment.add`, which refuses a recipe that cannot run; the experiment is then as it was."""

    @functools.wraps(theirs)
    def add(self: Any, *args: Any, **options: Any) -> str:
        task_id = theirs(self, *args, **options)
        job = self._jobs[-1]
        despite = [name for each in job.plugins or () for name in getattr(each, "despite", ())]
        try:
            for recipe, executor in _tasks(job):
                if isinstance(recipe, Recipe) and recipe.is_training:
                    refuse_unfit(recipe, executor, first=len(self._jobs) == 1, despite=despite)
        except ConfigError:
            self._jobs.pop()
            raise
        return task_id

    return add


def _tasks(job: Any) -> Iterable[tuple[Any, Any]]:
    """The tasks that were added together, each with its executor."""
    if not hasattr(job, "tasks"):
        return [(job.task, job.executor)]
    executors = job.executors
    if not isinstance(executors, list):  # one, in which NeMo-Run has put those of the tasks
        parts = executors.resource_group
        executors = parts if len(parts) == len(job.tasks) else [executors] * len(job.tasks)
    return zip(job.tasks, executors, strict=True)


def _package(name: str, task: Any, executor: Any, **options: Any) -> Any:
    """As NeMo-Run's `package`; the plugins of the task have changed it before."""
    assert _theirs is not None
    if isinstance(task, Recipe) and task.is_training:
        task = task_for_job(task, name, executor)
    return _theirs(name, task, executor=executor, **options)


def task_for_job(recipe: Recipe, name: str, executor: Any) -> Any:
    """The task for NeMo-Run's runner. A run without a name gets that of its task, and the experiment's number."""
    import nemo_run

    from fiddlehead.launch.nemo.runner import run_in_job

    if recipe.log.nsys is not None:  # NeMo-Run starts the job under nsys
        executor.get_launcher().nsys_profile = True
    tunnel = getattr(executor, "tunnel", None)
    folder = user_path(recipe.log.dir)
    if not isinstance(tunnel, nemo_run.SSHTunnel):
        folder = folder.absolute()
        _mount(executor, folder)
    number = (executor.experiment_id or "").rpartition("_")[2]
    return nemo_run.Partial(
        run_in_job,
        recipe=recipe.to_yaml(),
        folder=str(folder),
        name=recipe.log.name or f"{name.rpartition('.')[2]}_{number}",
        allow=recipe.names_to_allow(),
        executor=_as_ours(executor),
    )


def _as_ours(executor: Any) -> str:
    """Our executor for a Slurm job, as JSON: it knows the job's state, and how to start it again; "" for other jobs."""
    if kind_of(executor, exact=True) != SlurmExecutor.kind:
        return ""
    try:
        ours = SlurmExecutor.of_nemo_run(executor)
    except ConfigError:  # a field that only NeMo-Run knows; the job is its own
        return ""
    there = {"host": None, "user": None, "port": None, "identity": None, "remote_dir": ""}  # it is read on the cluster
    return json.dumps(asdict(replace(ours, **there)))


def _mount(executor: Any, folder: Path) -> None:
    """Adds the folder of runs to the mounts of the executor's containers, if it has any: else the run would be lost."""
    import nemo_run

    if isinstance(executor, nemo_run.DockerExecutor):
        mounts = [each.volumes for each in (executor, *executor.resource_group)]
    elif isinstance(executor, nemo_run.SlurmExecutor):
        containers = [each for each in (executor, *executor.resource_group) if each.container_image]
        mounts = [each.container_mounts for each in containers]
    else:
        return
    for each in mounts:
        if not any(folder.is_relative_to(mount.split(":")[1]) for mount in each if mount.count(":")):
            each.append(f"{folder}:{folder}")
    if mounts:
        folder.mkdir(PRIVATE, parents=True, exist_ok=True)  # else the engine would, and as root
