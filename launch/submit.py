"""From a plan to a run: writes the run's directory and submits its job."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from fiddlehead import job
from fiddlehead.environment import describe_environment
from fiddlehead.errors import FULL_DISK, ConfigError, Problem, RunError, of_the_machine
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.foreign import read_object
from fiddlehead.files.paths import user_path
from fiddlehead.launch import code, modules, secrets, watch
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.script import job_script
from fiddlehead.launch.taken import refuse_taken
from fiddlehead.recipe import Recipe, trust
from fiddlehead.run import RunDirectory, State, Status, locks, workers
from fiddlehead.run.directory import PRIVATE, exclusive
from fiddlehead.run.names import reserve_name
from fiddlehead.run.prediction import Prediction
from fiddlehead.run.status import this_process
from fiddlehead.run.terminal import shown_on


class RunFailedError(RuntimeError):
    """A run did not succeed."""

    def __init__(self, run: RunDirectory, status: Status) -> None:
        super().__init__(f"run {run.path} {status.state}: {status.reason or 'see its log'}")
        self.run, self.status = run, status


def run_here(
    recipe: Recipe, prediction: Prediction, *, name: str | None, allow: Sequence[str], command: str | None
) -> RunDirectory:
    """Runs a plan in this process; see `Plan.submit`."""
    from fiddlehead.run.console import become_rank_zero

    run = write_run(recipe, None, prediction, name=name, command=command)
    become_rank_zero()
    with _copied_to(run.log), workers.apart():
        allow = sorted({*recipe.names_to_allow(), *allow})
        job.execute(run, functools.partial(job.run_recipe, run.recipe, allow))
    _refuse_failure(run, run.status())
    return run


def run_elsewhere(
    recipe: Recipe,
    executor: Executor,
    prediction: Prediction,
    *,
    name: str | None,
    detach: bool,
    allow: Sequence[str],
    command: str | None,
    after: Sequence[RunDirectory],
    after_any: Sequence[RunDirectory],
) -> RunDirectory:
    """Runs a plan on its executor; see `Plan.submit`."""
    with contextlib.ExitStack() as held:
        run, log_start = hand_over(
            recipe, executor, prediction, None if detach else held,
            name=name, allow=allow, command=command, after=after, after_any=after_any,
        )  # fmt: skip
        if not detach:
            _refuse_failure(run, watch.follow(run, start=log_start))
    return run


def _refuse_failure(run: RunDirectory, status: Status | None) -> None:
    """Raises RunFailedError unless a run has succeeded."""
    if status is None or status.state is not State.SUCCEEDED:
        raise RunFailedError(run, status or Status(State.DIED, reason="it left no status"))


def hand_over(
    recipe: Recipe,
    executor: Executor,
    prediction: Prediction,
    lifetime: contextlib.ExitStack | None,
    *,
    name: str | None = None,
    allow: Sequence[str] = (),
    command: str | None = None,
    after: Sequence[RunDirectory] = (),
    after_any: Sequence[RunDirectory] = (),
) -> tuple[RunDirectory, int]:
    """Submits a plan to its executor; returns the run and the previous length of its log.

    Args:
        lifetime: if the executor's jobs end with their launcher, the job ends with this block; None: it continues.

    Raises:
        ConfigError: as `Plan.submit`.
        RunError: the disk is full, or the job was submitted but its id cannot be saved.
    """
    allow = sorted({*recipe.names_to_allow(), *allow})
    run = write_run(recipe, executor, prediction, name=name, command=command, allow=allow, detach=lifetime is None)
    if lifetime is not None:
        lifetime.enter_context(_alive(run))
    log_start = run.log.stat().st_size if run.log.exists() else 0
    try:
        job_id = executor.submit(
            run, after=[before.job_id for before in after], after_any=[before.job_id for before in after_any]
        )
    except OSError as error:
        _give_up(run, error)
        if error.errno in FULL_DISK:
            raise RunError(Problem("executor", executor.kind, of_the_machine(error))) from error
        message = (
            f"cannot write {error.filename}: {error.strerror}; if there is no home directory, set NEMORUN_HOME and "
            "FIDDLEHEAD_CACHE to other folders"
        )
        raise ConfigError(Problem("executor", executor.kind, message)) from error
    except BaseException as error:
        _give_up(run, error)
        raise
    try:
        run.write_job_id(job_id)
    except OSError as error:
        raise RunError(
            f"the job {job_id} of {run.path} was handed over, but its number cannot be written down: "
            f"{of_the_machine(error) or error}; end it where it is"
        ) from error
    return run, log_start


def rehearse(recipe: Recipe, executor: Executor) -> str:
    """Does everything that `hand_over` does before it submits a job, in a folder that is then deleted.

    Returns a sentence about what would be shipped; "" for an executor that ships nothing.

    Raises:
        ConfigError: the executor lacks something that the run needs.
    """
    secrets.collect(executor.secrets)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / (recipe.log.name or "rehearsal"))
        run.path.mkdir()
        copy = _ship(run, recipe, executor, [user_path(recipe.log.dir)])
        write_atomically(
            run.script, job_script(run, executor, recipe.names_to_allow(), copy=copy, nsys=recipe.log.nsys), mode=0o600
        )
        executor.check(run)
        return copy.describe() if copy else ""


def write_run(
    recipe: Recipe,
    executor: Executor | None,
    prediction: Prediction | None = None,
    *,
    name: str | None,
    command: str | None,
    allow: Sequence[str] = (),
    detach: bool = False,
) -> RunDirectory:
    """Writes the directory of a run that is to start.

    Args:
        prediction: what the plan predicts; None: the job finds out.
        allow: additional names that the job's recipe may use.
        detach: the job must continue after its launcher ends.

    Raises:
        ConfigError: the run's name is taken, its directory cannot be written, or the executor lacks something that
            the run needs. A new run then leaves no directory.
    """
    recipe = recipe.clone()
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
                _write_sources(run, recipe)
                recipe.save(run.recipe)
                with run.command.open("a") as file:
                    file.write((command or shlex.join(sys.argv)) + "\n")
                write_atomically(run.environment, json.dumps(describe_environment(Path.cwd()), indent=1) + "\n")
                if prediction is not None:
                    run.write_prediction(prediction)
                if executor is not None:
                    _write_job(run, recipe, executor, allow, detach=detach)
                trust.remember(run, recipe.names_to_allow())
                attempt = 1 if before is None else before.attempt + 1
                status = this_process(attempt, "direct" if executor is None else executor.kind)
                run.clear_stop_request()
                run.write_status(replace(status, state=State.PENDING, started=time.time(), submission=attempt))
        except BaseException:
            secrets.remove(run)
            if new:
                trust.forget(run)
                shutil.rmtree(run.path)
            raise
    except OSError as error:
        message = f"cannot write there: {of_the_machine(error) or error}"
        raise ConfigError(Problem("log.dir", directory, message)) from error
    return run


def _write_sources(run: RunDirectory, recipe: Recipe) -> None:
    """Writes where each value was set. Of a value that comes from the run's own recipe, what was known stays."""
    try:
        before = read_object(run.sources)
    except ConfigError:  # there is none, or a damaged one, which is replaced
        before = {}
    found = recipe.sources()
    for path, source in found.items():
        if before and path in ("log.name", "log.dir"):  # where it is already, whoever says so now
            found[path] = before.get(path, "default")
        elif user_path(source.rpartition(":")[0]).absolute() == run.recipe:
            found[path] = before.get(path, source)
    set_ones = {path: source for path, source in found.items() if source != "default"}
    write_atomically(run.sources, json.dumps(set_ones, indent=1) + "\n")


def _close(folder: Path) -> None:
    """Removes other users' permissions from a run's folder, which may have existed before."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IRWXO:
        try:
            folder.chmod(mode & ~stat.S_IRWXO)
        except PermissionError:
            print(f"WARNING: others can read {folder}, and this user cannot change that")  # noqa: T201


def _write_job(run: RunDirectory, recipe: Recipe, executor: Executor, allow: Sequence[str], *, detach: bool) -> None:
    """Writes the other files of a job: its code, its secrets, its script."""
    executor.save(run)
    copy = _ship(run, recipe, executor, [run.path.parent])
    if copy and copy.left_out:
        print(copy.describe_left_out())  # noqa: T201
    secrets_file = executor.deliver_secrets(run, secrets.collect(executor.secrets))
    lock = run.launcher_lock if executor.dies_with_launcher and not detach else None
    nsys = recipe.log.nsys
    script = job_script(run, executor, allow, copy=copy, secrets_file=secrets_file, lock=lock, nsys=nsys)
    write_atomically(run.script, script, mode=0o600)
    executor.check(run)


def _ship(run: RunDirectory, recipe: Recipe, executor: Executor, exclude: Sequence[Path]) -> code.CodeCopy | None:
    """Copies the working tree for a job that cannot see it; None for a job that can.

    Raises:
        ConfigError: it cannot be copied, or lacks something that the recipe needs.
    """
    if not executor.ships_code:
        return None
    copy = code.ship(Path.cwd(), run.code, exclude=exclude)
    for line in modules.check(recipe.names_to_allow(), copy, executor):
        print(f"WARNING: {line}")  # noqa: T201
    return copy


@contextlib.contextmanager
def _alive(run: RunDirectory) -> Iterator[None]:
    """Holds the lock that tells a job that its launcher lives; the kernel releases it when this process ends."""
    with run.launcher_lock.open("w") as file:
        locks.wait_for(file)
        yield


def _give_up(run: RunDirectory, error: BaseException) -> None:
    """Marks a run as never submitted."""
    before = run.written_status()
    if before is not None and before.state is State.PENDING:
        reason = f"was not submitted: {error or type(error).__name__}"
        run.write_status(replace(before, state=State.FAILED, ended=time.time(), exit_code=1, reason=reason))
    secrets.remove(run)


@contextlib.contextmanager
def _copied_to(file: Path) -> Iterator[None]:
    """Appends the output of this process to `file`."""

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
        shown_on(sys.stdout) as shown,
        contextlib.redirect_stdout(Copy(shown)),
        contextlib.redirect_stderr(Copy(shown if sys.stderr.isatty() and sys.stdout.isatty() else sys.stderr)),
    ):
        yield
