"""Where a run can go. `launch` starts a recipe there; each executor is one file with one function that returns it."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from fiddlehead import job
from fiddlehead.errors import FULL_DISK, ConfigError, RunError, of_the_machine
from fiddlehead.files.atomic import write_atomically
from fiddlehead.launch import secrets, watch
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.fit import fit_to_executor, missing_here, yielded
from fiddlehead.launch.prepare import check, prepare, rehearse
from fiddlehead.recipe import Recipe
from fiddlehead.run import locks, workers
from fiddlehead.run.directory import RunDirectory, State, Status

__all__ = [
    "Executor",
    "RunFailedError",
    "check",
    "fit_to_executor",
    "launch",
    "missing_here",
    "prepare",
    "rehearse",
    "start",
    "yielded",
]


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
    after: Sequence[RunDirectory] = (),
    after_any: Sequence[RunDirectory] = (),
) -> RunDirectory:
    """Starts a recipe, and waits for it unless told to detach.

    Args:
        recipe: what to run; it is checked first, and not changed.
        executor: where; None is this process.
        name: what the run is called, with date and time behind it, if `recipe.log.name` does not say; else its task.
        detach: return as soon as the job is handed over.
        allow: what the job's recipe may name, besides the recipe's own classes and functions.
        command: what to record as having started the run.
        after: runs of the same executor, one that queues jobs, that must have succeeded first.
        after_any: such runs that must have ended first, however.

    Raises:
        ConfigError: the recipe is wrong, or its run is running, or the executor cannot do it; nothing was started.
        RunFailedError: the run ended, but not well.
    """
    if executor is None:
        if after or after_any:
            raise ConfigError("a run in this process starts at once; name an executor for one that waits")
        names = sorted({*recipe.names_to_allow(), *allow})
        run, recipe = prepare(recipe, None, name=name, command=command)
        from fiddlehead.run.console import become_rank_zero

        become_rank_zero()
        with copied_to(run.log), workers.apart():
            job.execute(run, lambda: job.run_recipe(run.recipe, names))
        status = run.status()
    else:
        with contextlib.ExitStack() as held:
            lifetime = None if detach else held
            run, log_start = start(
                recipe, executor, lifetime,
                name=name, allow=allow, command=command, after=after, after_any=after_any,
            )  # fmt: skip
            if detach:
                return run
            status = watch.follow(run, start=log_start)
    if status is None or status.state is not State.SUCCEEDED:
        raise RunFailedError(run, status or Status(State.DIED, reason="it left no status"))
    return run


def start(
    recipe: Recipe,
    executor: Executor,
    lifetime: contextlib.ExitStack | None,
    *,
    name: str | None = None,
    allow: Sequence[str] = (),
    command: str | None = None,
    after: Sequence[RunDirectory] = (),
    after_any: Sequence[RunDirectory] = (),
) -> tuple[RunDirectory, int]:
    """Hands a recipe over to an executor, as `launch` does, and returns the run and how long its log was before.

    Args:
        lifetime: the job ends when this does, where the executor's jobs end with their launcher; None: it does not.
    """
    run, _ = prepare(
        recipe, executor, sorted({*recipe.names_to_allow(), *allow}),
        name=name, command=command, detach=lifetime is None, waits=bool(after or after_any),
    )  # fmt: skip
    executor = watch.load_executor(run) or executor  # as it was fitted to the recipe
    if lifetime is not None:
        lifetime.enter_context(alive(run))
    log_start = run.log.stat().st_size if run.log.exists() else 0
    try:
        job_id = executor.submit(
            run, after=[before.job_id for before in after], after_any=[before.job_id for before in after_any]
        )
    except OSError as error:
        give_up(run, error)
        if error.errno in FULL_DISK:
            raise RunError(f"executor={executor.kind}: {of_the_machine(error)}") from error
        raise ConfigError(
            f"executor={executor.kind}: cannot write {error.filename}: {error.strerror}; where that is for want of a "
            "home, NEMORUN_HOME and FIDDLEHEAD_CACHE name other folders"
        ) from error
    except BaseException as error:
        give_up(run, error)
        raise
    try:
        write_atomically(run.path / "job_id", job_id + "\n")
    except OSError as error:
        raise RunError(
            f"the job {job_id} of {run.path} was handed over, but its number cannot be written down: "
            f"{of_the_machine(error) or error}; end it where it is"
        ) from error
    return run, log_start


@contextlib.contextmanager
def alive(run: RunDirectory) -> Iterator[None]:
    """Holds the lock by which a job that dies with its launcher knows that this one is there; the kernel lets go."""
    with run.launcher_lock.open("w") as file:
        locks.wait_for(file)
        yield


def give_up(run: RunDirectory, error: BaseException) -> None:
    """Notes that a run was never handed over."""
    before = run.written_status()
    if before is not None and before.state is State.PENDING:
        reason = f"was not submitted: {error or type(error).__name__}"
        run.write_status(replace(before, state=State.FAILED, ended=time.time(), exit_code=1, reason=reason))
    secrets.remove(run)


@contextlib.contextmanager
def copied_to(file: Path) -> Iterator[None]:
    """Copies what this process prints to the end of `file`."""

    class Copy(io.TextIOBase):
        def __init__(self, terminal: TextIO) -> None:
            self.terminal = terminal

        def write(self, text: str) -> int:
            self.terminal.write(text)
            try:
                log.write(text.encode(errors="replace"))
            except OSError:
                self.terminal.write("\n" * (not text.endswith("\n")))  # the error to come is a line of its own
                raise
            return len(text)

        def flush(self) -> None:
            self.terminal.flush()

        def isatty(self) -> bool:
            return self.terminal.isatty()

    with (
        file.open("ab", buffering=0) as log,  # nothing is left to be written when it is closed, on a full disk
        contextlib.redirect_stdout(Copy(sys.stdout)),
        contextlib.redirect_stderr(Copy(sys.stderr)),
    ):
        yield
