"""What happens before a run starts: its recipe is checked, and its directory is written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fiddlehead.environment import describe_environment
from fiddlehead.errors import ConfigError, Elsewhere, of_the_machine
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.paths import user_path, working_directory
from fiddlehead.launch import code, modules, secrets, watch
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.fit import GPU, fit_to_executor, missing_here, yielded
from fiddlehead.launch.script import job_script
from fiddlehead.recipe import Recipe, trust
from fiddlehead.run import damage
from fiddlehead.run.directory import (
    PRIVATE,
    RunDirectory,
    State,
    exclusive,
    is_here,
    reserve_name,
    this_process,
    way_out,
)

NAMELESS = ".nameless"
"""What a run is called that has no name yet, while it is checked; there is none of this name."""


def prepare(
    recipe: Recipe,
    executor: Executor | None,
    allow: Sequence[str] = (),
    *,
    name: str | None = None,
    command: str | None = None,
    detach: bool = False,
    waits: bool = False,
) -> tuple[RunDirectory, Recipe]:
    """Checks a recipe and writes its run directory: everything that is known before the job starts.

    Returns the directory and the recipe as it will run.

    Args:
        allow: what the job's recipe may name beside what any recipe may.
        detach: the job shall outlive its launcher.
        waits: the run waits for others, so what it resumes from need not be there yet.

    Raises:
        ConfigError: the recipe is wrong, does not fit the executor, or its run is running or was another recipe's, or
            the executor has not what it takes; a new run leaves no directory then.
    """
    given, recipe = recipe, fit_to_executor(recipe, executor)
    for sentence in yielded(given, recipe):
        print(f"changed: {sentence}")  # noqa: T201
    waits = waits or (executor is not None and executor.keeps_runs_elsewhere)
    plan = check(recipe, here=executor is None or not executor.ships_code, waits=waits)
    if plan.missing:
        raise ConfigError(plan.missing)
    directory = user_path(recipe.log.dir)
    try:
        named = recipe.log.name is not None
        if not named:
            recipe.log.name = reserve_name(name or recipe.__fn_or_cls__.__name__, directory)
        run = RunDirectory((directory / recipe.log.name).absolute())
        new = not named or not run.path.exists()
        run.path.mkdir(PRIVATE, parents=True, exist_ok=True)
        _close(run.path)
        try:
            with exclusive(run):
                refuse_taken(run, recipe)
                before = run.written_status()
                recipe.save(run.recipe)
                with run.command.open("a") as file:
                    file.write((command or shlex.join(sys.argv)) + "\n")
                write_atomically(run.environment, json.dumps(describe_environment(Path.cwd()), indent=1) + "\n")
                if executor is not None:
                    _prepare_job(run, recipe, executor, allow, detach=detach)
                trust.remember(run, recipe.names_to_allow())
                attempt = 1 if before is None else before.attempt + 1
                status = this_process(attempt, "direct" if executor is None else executor.kind)
                run.write_status(replace(status, state=State.PENDING, started=time.time()))
        except BaseException:
            secrets.remove(run)
            if new:
                trust.forget(run)
                shutil.rmtree(run.path)
            raise
    except OSError as error:
        raise ConfigError(
            f"log.dir={str(directory)!r}: cannot write there: {of_the_machine(error) or error}"
        ) from error
    return run, recipe


def _close(folder: Path) -> None:
    """Takes the permissions of others away from a run's folder, which may have been there before."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IRWXO:
        try:
            folder.chmod(mode & ~stat.S_IRWXO)
        except PermissionError:
            print(f"WARNING: others can read {folder}, and this user cannot change that")  # noqa: T201


def rehearse(recipe: Recipe, executor: Executor, *, waits: bool = False) -> str:
    """Does all that a launch does before the job is handed over, in a folder that is then deleted.

    Args:
        waits: as for `prepare`.

    Returns what would be shipped, in a sentence; "" for an executor that ships nothing.

    Raises:
        ConfigError: the recipe does not fit the executor, or the executor has not what it takes.
    """
    recipe = fit_to_executor(recipe, executor)
    here = not executor.ships_code and not missing_here(recipe)
    check(recipe, here=here, waits=waits or executor.keeps_runs_elsewhere)
    secrets.collect(executor.secrets)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / (recipe.log.name or "rehearsal"))
        run.path.mkdir()
        executor = _fitted(executor, recipe)
        copy = _ship(run, recipe, executor, [user_path(recipe.log.dir)])
        write_atomically(run.script, job_script(run, executor, recipe.names_to_allow(), copy=copy), mode=0o600)
        executor.check(run)
        return copy.describe() if copy else ""


def _fitted(executor: Executor, recipe: Recipe) -> Executor:
    """The executor with what follows from a recipe that was fitted to it."""
    trainer = recipe.trainer
    return executor.fitted(int(trainer.devices), str(trainer.accelerator), int(trainer.num_nodes))


def _prepare_job(run: RunDirectory, recipe: Recipe, executor: Executor, allow: Sequence[str], *, detach: bool) -> None:
    """Writes what a job needs beside the recipe: its code, its secrets, its script."""
    executor = _fitted(executor, recipe)
    executor.save(run)
    copy = _ship(run, recipe, executor, [run.path.parent])
    if copy and copy.left_out:
        print(copy.describe_left_out())  # noqa: T201
    secrets_file = executor.deliver_secrets(run, secrets.collect(executor.secrets))
    attached = executor.dies_with_launcher and not detach
    lock = run.launcher_lock if attached else None
    script = job_script(
        run,
        executor,
        allow,
        copy=copy,
        secrets_file=secrets_file,
        lock=lock,
    )
    write_atomically(run.script, script, mode=0o600)
    executor.check(run)


def _ship(run: RunDirectory, recipe: Recipe, executor: Executor, exclude: Sequence[Path]) -> code.CodeCopy | None:
    """Copies the working tree for a job that does not see it; None for one that does.

    Raises:
        ConfigError: it cannot be copied, or has not all that the recipe needs.
    """
    if not executor.ships_code:
        return None
    copy = code.ship(Path.cwd(), run.code, exclude=exclude)
    for line in modules.check(recipe.names_to_allow(), copy, executor):
        print(f"WARNING: {line}")  # noqa: T201
    return copy


def check(recipe: Recipe, *, here: bool = True, waits: bool = False) -> Any:
    """Builds everything that a recipe configures, the model without its memory, and returns the task's plan.

    It writes nothing. Without `here`, the recipe need not be able to run on this machine; where it `waits` for another
    run, or is kept on another machine, what it resumes from need not be there.

    Raises:
        ConfigError: with every problem, each under its path.
    """
    from fiddlehead import bench, tasks
    from fiddlehead.plan.resume import resume_point
    from fiddlehead.plan.training import begin, plan_training
    from fiddlehead.run import workers

    trainings = (tasks.pretrain, tasks.finetune, bench.benchmark)
    if recipe.__fn_or_cls__ not in trainings:
        known = ", ".join(f"{task.__module__}:{task.__name__}" for task in trainings)
        raise ConfigError(f"the recipe configures {recipe.__fn_or_cls__.__qualname__}; what can be launched: {known}")
    working_directory()  # what is relative is in it
    recipe = recipe.clone()
    missing = missing_here(recipe)
    if here and missing:
        raise ConfigError(missing)
    elsewhere = recipe.trainer.accelerator in GPU and (not here or bool(missing))
    if elsewhere:
        recipe.trainer.accelerator = "cpu"
    with workers.apart():
        parts = recipe.build_arguments()
        begin(*(parts[name] for name in ("model", "data", "trainer", "optim")))
        plan = plan_training(**parts, target=None if elsewhere else "trainer")
    directory = user_path(recipe.log.dir).absolute()
    try:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if not os.access(existing, os.W_OK) or not existing.is_dir():
            raise ConfigError(f"log.dir={recipe.log.dir!r}: {existing} cannot be written")
        run = RunDirectory(directory / (recipe.log.name or NAMELESS))
        refuse_taken(run, recipe)
    except OSError as error:
        raise ConfigError(f"log.dir={recipe.log.dir!r}: {error.strerror} ({error.filename})") from error
    if not waits:
        resume_point(run, recipe.resume)
    return plan


FREE_TO_CHANGE = (
    # How long, how often and how loud a run is, and what it runs on: none of it makes it another run.
    "trainer.max_steps",
    "trainer.log_every_n_steps",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.accelerator",
    "model.compile",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "data.micro_batch_size",
    "data.num_workers",
    "data.cache_dir",
    "data.corpus",  # another one is not known yet, and `paths` says for itself
    "model.config.attention_backend",
    "resume",
)


def refuse_taken(run: RunDirectory, recipe: Recipe) -> None:
    """Raises ConfigError if the run is running, or was another recipe's."""
    if run.path.exists() and (problems := damage.in_the_way(run)):
        raise ConfigError(*(Elsewhere(problem) for problem in problems))
    (before,) = watch.states([run])
    if before is not None and not before.state.ended:
        gone = "" if is_here(before) else f" ({way_out(run)})"
        raise ConfigError(
            f"log.name={run.name!r} is running ({before.state}, process {before.pid} on {before.host}); "
            f"cancel it with `fiddlehead runs cancel {run.name}`{gone}, or choose another name"
        )
    if not run.recipe.exists():
        if run.path.exists() and (not run.path.is_dir() or any(each.name != ".lock" for each in run.path.iterdir())):
            raise ConfigError(f"log.name={run.name!r}: {run.path} is there and is not a run; choose another name")
        return
    try:
        earlier = Recipe.load(run.recipe, allow=recipe.names_to_allow())
    except ConfigError as error:
        advice = f"log.name={run.name!r}: its recipe cannot be read; mend that file, or choose another name"
        raise ConfigError(*map(Elsewhere, error.problems), advice) from error
    differences = [
        difference
        for difference in recipe.diff(earlier)
        if difference.path not in FREE_TO_CHANGE
        and not difference.path.startswith(("log.", "checkpoint.", "trainer.strategy."))
    ]
    if differences:
        lines = "\n".join(f"  {d.path}: {d.right!r} before, {d.left!r} now" for d in differences)
        raise ConfigError(f"log.name={run.name!r} is another recipe's run; choose another name, or undo:\n{lines}")
