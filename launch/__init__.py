"""Where a run can go. `launch` starts a recipe there; each executor is one file with one function that returns it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fiddlehead import job
from fiddlehead.environment import describe_environment
from fiddlehead.errors import ConfigError
from fiddlehead.launch import local
from fiddlehead.recipe import Recipe
from fiddlehead.runs import RunDirectory, State, Status, exclusive, reserve_name, this_process, write_atomically

if TYPE_CHECKING:
    from nemo_run import Executor


class RunFailedError(RuntimeError):
    """A run ended otherwise than it should have."""

    def __init__(self, run: RunDirectory, status: Status) -> None:
        super().__init__(f"run {run.path} {status.state}: {status.reason or 'see its log'}")
        self.run, self.status = run, status


def launch(
    recipe: Recipe,
    executor: Executor | None = None,
    *,
    name: str | None = None,
    detach: bool = False,
    allow: Sequence[str] = (),
    command: str | None = None,
) -> RunDirectory:
    """Starts a recipe, and waits for it unless told to detach.

    Args:
        recipe: what to run; it is checked first, and not changed.
        executor: where; None is this process.
        name: what the run is called, with date and time behind it, if `recipe.log.name` does not say; else its task.
        detach: return as soon as the job has started.
        allow: modules, besides those of the recipe's own classes and functions, that the job may import.
        command: what to record as having started the run.

    Raises:
        ConfigError: the recipe is wrong, or its run is running; nothing was started.
        RunFailedError: the run ended, but not well.
    """
    run, recipe = prepare(recipe, executor, name=name, command=command)
    modules = sorted({*recipe.modules(), *allow})
    if executor is None:
        with copied_to(run.log):
            job.execute(run, lambda: job.run_recipe(run.recipe, modules))
    else:
        local.submit(run, executor, modules, detach=detach)
        if detach:
            return run
    status = run.status()
    if status is None or status.state is not State.SUCCEEDED:
        raise RunFailedError(run, status or Status(State.DIED, reason="it left no status"))
    return run


def prepare(
    recipe: Recipe, executor: Executor | None, *, name: str | None = None, command: str | None = None
) -> tuple[RunDirectory, Recipe]:
    """Checks a recipe and writes its run directory: everything that is known before the job starts.

    Returns the directory and the recipe as it will run.

    Raises:
        ConfigError: the recipe is wrong, does not fit the executor, or its run is running or was another recipe's.
    """
    recipe = fit_to_executor(recipe, executor)
    check(recipe)
    directory = Path(recipe.log.dir)
    try:
        if recipe.log.name is None:
            recipe.log.name = reserve_name(name or recipe.__fn_or_cls__.__name__, directory)
        run = RunDirectory((directory / recipe.log.name).absolute())
        run.path.mkdir(parents=True, exist_ok=True)
        with exclusive(run):
            refuse_taken(run, recipe)
            before = run.written_status()
            recipe.save(run.recipe)
            with run.command.open("a") as file:
                file.write((command or shlex.join(sys.argv)) + "\n")
            write_atomically(run.environment, json.dumps(describe_environment(Path.cwd()), indent=1) + "\n")
            attempt = 1 if before is None else before.attempt + 1
            kind = "direct" if executor is None else type(executor).__name__.removesuffix("Executor").lower()
            status = this_process(attempt, kind)
            run.write_status(replace(status, state=State.SUBMITTED, started=time.time()))
    except OSError as error:
        raise ConfigError(
            f"log.dir={str(directory)!r}: cannot write there: {error.strerror} ({error.filename})"
        ) from error
    return run, recipe


def check(recipe: Recipe, *, here: bool = True) -> Any:
    """Builds everything that a recipe configures, the model without its memory, and returns the task's plan.

    It writes nothing. Without `here`, the recipe need not be able to run on this machine.

    Raises:
        ConfigError: with every problem, each under its path.
    """
    import torch

    from fiddlehead import tasks

    planners: dict[Any, Callable] = {tasks.pretrain: tasks.plan_pretrain}
    if recipe.__fn_or_cls__ not in planners:
        known = ", ".join(f"{task.__module__}:{task.__name__}" for task in planners)
        raise ConfigError(f"the recipe configures {recipe.__fn_or_cls__.__qualname__}; what can be launched: {known}")
    recipe = recipe.clone()
    elsewhere = recipe.trainer.accelerator == "gpu" and not torch.cuda.is_available() and not here
    if elsewhere:
        recipe.trainer.accelerator, recipe.trainer.devices = "cpu", 1
    plan = planners[recipe.__fn_or_cls__](**recipe.build_arguments(), elsewhere=elsewhere)
    if recipe.log.name is not None:
        run = RunDirectory((Path(recipe.log.dir) / recipe.log.name).absolute())
        refuse_taken(run, recipe)
        tasks.resume_point(run, recipe.resume)
    existing = next(path for path in Path(recipe.log.dir).absolute().parents if path.exists())
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        raise ConfigError(f"log.dir={recipe.log.dir!r}: {existing} cannot be written")
    return plan


def fit_to_executor(recipe: Recipe, executor: Executor | Recipe | None) -> Recipe:
    """A copy of the recipe whose trainer uses the executor's nodes and processes.

    `executor` may also be the configured call of an executor function, which has the same arguments.

    Raises:
        ConfigError: the recipe says otherwise, or in a way that is not understood.
    """
    recipe = recipe.clone()
    if "trainer" not in recipe.__arguments__:
        return recipe
    trainer = recipe.trainer
    processes = getattr(executor, "ntasks_per_node", 1)
    nodes = getattr(executor, "nodes", 1)
    problems = []
    devices = trainer.devices
    if devices in ("auto", -1):
        devices = "auto"
    elif not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        problems.append(f"trainer.devices={devices!r}: must be how many there are on a node (1 or more), or 'auto'")
    if processes == local.FOLLOW_RECIPE:
        processes = _devices_here(trainer.accelerator) if devices == "auto" else devices
    elif devices not in ("auto", processes) and not problems:
        where = "one process without an executor" if executor is None else f"executor.ntasks_per_node={processes}"
        problems.append(f"trainer.devices={devices!r}: {where}; set one of them, or both alike")
    if trainer.num_nodes not in (1, nodes):
        problems.append(
            f"trainer.num_nodes={trainer.num_nodes}: executor.nodes={nodes}; set one of them, or both alike"
        )
    if problems:
        raise ConfigError(*problems)
    trainer.devices, trainer.num_nodes = processes, nodes
    return recipe


def _devices_here(accelerator: str) -> int:
    """What "auto" means on this machine: all GPUs, or one process on a CPU."""
    import torch

    return max(1, torch.cuda.device_count()) if accelerator in ("gpu", "cuda", "auto") else 1


@contextlib.contextmanager
def copied_to(file: Path) -> Iterator[None]:
    """Copies what this process prints to the end of `file`."""

    class Copy(io.TextIOBase):
        def __init__(self, terminal: TextIO) -> None:
            self.terminal = terminal

        def write(self, text: str) -> int:
            log.write(text)
            return self.terminal.write(text)

        def flush(self) -> None:
            self.terminal.flush()

        def isatty(self) -> bool:
            return self.terminal.isatty()

    with (
        file.open("a", buffering=1) as log,
        contextlib.redirect_stdout(Copy(sys.stdout)),
        contextlib.redirect_stderr(Copy(sys.stderr)),
    ):
        yield


FREE_TO_CHANGE = (
    # How long, how often and how loud a run is, and what it runs on: none of it makes it another run.
    "trainer.max_steps",
    "trainer.log_every_n_steps",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "data.micro_batch_size",
    "data.num_workers",
    "data.cache_dir",
    "model.config.attention_backend",
    "resume",
)


def refuse_taken(run: RunDirectory, recipe: Recipe) -> None:
    """Raises ConfigError if the run is running, or was another recipe's."""
    before = run.status()
    if before is not None and not before.state.ended:
        raise ConfigError(
            f"log.name={run.name!r} is running ({before.state}, process {before.pid} on {before.host}); "
            f"cancel it with `fiddlehead runs cancel {run.name}`, or choose another name"
        )
    if not run.recipe.exists():
        return
    earlier = Recipe.load(run.recipe, allow=sorted(recipe.modules()))
    differences = [
        difference
        for difference in recipe.diff(earlier)
        if difference.path not in FREE_TO_CHANGE and difference.path.split(".")[0] not in ("log", "checkpoint")
    ]
    if differences:
        lines = "\n".join(f"  {d.path}: {d.right!r} before, {d.left!r} now" for d in differences)
        raise ConfigError(f"log.name={run.name!r} is another recipe's run; choose another name, or undo:\n{lines}")
