"""The program of a job: `python -m fiddlehead.job RUN/recipe.yaml`.

It needs no launcher: this line repeats a run by hand. The first process of a job writes the run's status. On each node
one process starts the training processes, as torchrun does, unless they were started already or there is only one.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # the imports below would fail, and nobody would know why
    sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}, and fiddlehead needs 3.11 or later")
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working directory: a file `csv.py` in it must not take the place of the standard library's

import argparse
import atexit
import contextlib
import gc
import os
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fiddlehead.errors import FULL_DISK, ConfigError, RunError, StopRequested, format_warning, of_the_machine
from fiddlehead.run import locks, outcomes, preflight, signals, workers
from fiddlehead.run.alive import showing_life
from fiddlehead.run.directory import RunDirectory, exclusive
from fiddlehead.run.status import State, Status, StopRequest, this_process

MAX_FAILURES = 3
"""How many times in a row a restarted job may fail at the same step."""
TRY_AGAIN = 75
"""The exit code that asks for a restart."""
LAUNCHER_LOCK = "FIDDLEHEAD_LAUNCHER_LOCK"
"""The environment variable that names the file which an attached launcher keeps locked."""
LOCK_PATIENCE = 120.0
"""Seconds: a network file system may keep the locks of a lost node for as long as this."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a saved recipe in its run directory, with the number of processes in the recipe; returns the exit code."""
    try:
        signals.stop_at_once()
        return _run(sys.argv[1:] if argv is None else list(argv))
    except StopRequested as stop:  # before anything had begun
        print(stop, flush=True)  # noqa: T201
        return stop.exit_code
    finally:
        signals.ignore()  # otherwise they would kill the interpreter while it shuts down


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fiddlehead.job", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="RUN/recipe.yaml")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="MODULE[:NAME]", help="what of yours the recipe may name"
    )
    arguments = parser.parse_args(argv)
    run = RunDirectory(arguments.recipe.resolve().parent)

    def work() -> None:
        if workers.is_first() and (lock := _launcher_lock()):
            threading.Thread(target=_outlive, args=(run, lock), daemon=True).start()
        preflight.check(run, arguments.allow)
        nodes, devices = workers.size(run)
        rank = workers.this_rank(nodes, devices)
        if rank is None:
            workers.run_workers(run, nodes, devices, argv)
        else:
            workers.join(run, rank)
            run_recipe(run.recipe, arguments.allow)

    if workers.started_by_job():
        workers.become_worker(run)
        with _reported(run) as report:
            run_recipe(run.recipe, arguments.allow)
        return report.ending.exit_code
    if workers.is_first():
        return execute(run, work)
    with _reported(run) as report:
        work()
    code = report.ending.exit_code
    return 0 if code in outcomes.STOPPED else code  # a job has the highest code, which is for the first to choose


def run_recipe(file: Path, allow: Sequence[str] = ()) -> None:
    """Loads a recipe, builds its parts and calls its task, in the folder where the recipe is."""
    from fiddlehead.recipe import Recipe

    recipe = Recipe.load(file, allow=tuple(allow))
    recipe.log.dir, recipe.log.name = str(file.resolve().parent.parent), file.resolve().parent.name
    recipe.__fn_or_cls__(**recipe.build_arguments())


def execute(run: RunDirectory, work: Callable[[], None]) -> int:
    """Runs `work` and writes the run's status: RUNNING, then how it ended. Returns the exit code."""
    try:
        patience = LOCK_PATIENCE if signals.may_requeue() else 1.0
        with signals.restored(), exclusive(run, patience), showing_life(run.lock):
            signals.stop_at_once(run)
            before = run.written_status()
            status = _next_attempt(run, before)
            died = before is not None and before.state is State.RUNNING
            with _reported(run) as report:
                _begin(run, status, died=died)
                work()
            signals.ignore()  # the ending is decided
            ending = report.ending
            if ending.state is State.SUCCEEDED:
                ending = replace(ending, reason=run.early_end)
            status = _ended(run, status, ending)
            with contextlib.suppress(OSError):  # the reason was printed
                run.write_status(status)
            return status.exit_code or 0
    except ConfigError as error:  # someone else's run: its status is not touched
        _print_error(str(error))
        return 2
    except OSError as error:  # the folder cannot be written at all
        if not (line := of_the_machine(error)):
            raise
        _print_error(line)
        return 1


# -- attempts


def _next_attempt(run: RunDirectory, before: Status | None) -> Status:
    """The status of the new attempt; `before` is the last status of the previous attempt."""
    if before is None:
        return this_process(1, "direct")
    attempt = before.attempt if before.state is State.PENDING else before.attempt + 1
    status = replace(
        this_process(attempt, before.executor),
        submission=before.submission,
        failures=before.failures,
        failed_step=before.failed_step,
    )
    return _with_failure(status, run) if before.state is State.RUNNING else status


def _begin(run: RunDirectory, status: Status, *, died: bool) -> None:
    """Begins a new attempt, unless the run was cancelled meanwhile or dies again and again."""
    run.write_status(status)
    request = run.stop_request()
    if request and not request.requeue and run.stop_requested_since_submission():
        raise StopRequested(f"stopped before it began: {request.reason}")
    if died:
        words = f"attempt {status.attempt - 1} ended without a word at step {status.failed_step}"
        if signals.may_requeue() and status.failures >= MAX_FAILURES:
            raise RunError(f"{words}, as {MAX_FAILURES} in a row did: killed, out of memory, or its machine was lost")
        print(f"WARNING: {words}: killed, out of memory, or its machine was lost", flush=True)  # noqa: T201
    run.clear_stop_request()
    run.write_early_end("")
    outcomes.forget(run)


def _with_failure(status: Status, run: RunDirectory) -> Status:
    """The status with one more failure, at the newest step."""
    step = run.last_step()
    return replace(status, failures=status.failures + 1 if step == status.failed_step else 1, failed_step=step)


def _ended(run: RunDirectory, status: Status, ending: Ending) -> Status:
    """The status of an attempt that ended with `ending`, which may ask for another attempt."""
    if not ending.final:
        cause = outcomes.conclusion(run)  # if several processes fail, the first one is the cause
        if isinstance(cause, outcomes.WorkersFailedError):
            ending = replace(ending, reason=str(cause), final=cause.final)
    if not ending.final:
        status = _with_failure(status, run)
        if signals.may_requeue():
            failures = f"failure {status.failures} of {MAX_FAILURES} at step {status.failed_step}"
            again = status.failures < MAX_FAILURES
            reason = f"{ending.reason}; {failures}{', to be tried again' if again else ''}"
            ending = Ending(State.INTERRUPTED, TRY_AGAIN, reason) if again else replace(ending, reason=reason)
            _print(failures + (": trying again" if again else ": giving up"))
    return replace(status, state=ending.state, ended=time.time(), exit_code=ending.exit_code, reason=ending.reason)


# -- endings


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    state: State
    exit_code: int
    reason: str = ""
    final: bool = True
    """Whether there must be no other attempt: it would end in the same way, or nothing is left to do."""


@dataclass
class _Report:
    """The result of a block."""

    ending: Ending = Ending(State.SUCCEEDED, 0)  # it is frozen


@contextlib.contextmanager
def _reported(run: RunDirectory) -> Iterator[_Report]:
    """Catches the block's exceptions, and reports the error in the log and to the run's other processes."""
    report = _Report()
    try:
        yield report
    except (Exception, KeyboardInterrupt, StopRequested, SystemExit) as error:
        report.ending = _ending_of(error)
    ending = report.ending
    if ending.state is not State.SUCCEEDED and not outcomes.alone():
        outcomes.leave(run, outcomes.own_name(), ending.exit_code, ending.reason, final=ending.final)


def _ending_of(error: BaseException) -> Ending:
    """Prints the error and returns how the attempt ends."""
    if isinstance(error, StopRequested):
        if not workers.started_by_job():  # the process that started it prints the error
            _print(str(error))
        state = State.INTERRUPTED if error.requeue else State.CANCELLED
        return Ending(state, error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):  # in a thread or a library that has taken SIGINT back
        return Ending(State.CANCELLED, 130, "interrupted at once; the checkpoints before it are whole")
    if isinstance(error, (ConfigError, RunError)):
        _print_error(str(error))
        if isinstance(error, outcomes.WorkersFailedError):
            return Ending(State.FAILED, error.exit_code, str(error), final=error.final)
        return Ending(State.FAILED, 2 if isinstance(error, ConfigError) else 1, str(error))
    if line := of_the_machine(error):
        _print_error(line)
        return Ending(State.FAILED, 1, line, final=isinstance(error, OSError) and error.errno in FULL_DISK)
    # Everything else, and a library's SystemExit.
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return Ending(State.FAILED, 1, f"{type(error).__name__}: {error}", final=False)


def _print(text: str, *, error: bool = False) -> None:
    """Prints a line; if the log's disk is full, the run must still end."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def _print_error(text: str) -> None:
    _print(f"error: {text}", error=True)


def _launcher_lock() -> Path | None:
    """The file that the launcher keeps locked if this job must end with it; None if there is none."""
    if LAUNCHER_LOCK not in os.environ:
        return None
    lock = Path(os.environ[LAUNCHER_LOCK])
    # Without `flock`, the job's script cannot see that nobody holds the lock: then it was run by hand.
    return lock if shutil.which("flock") or locks.is_taken(lock) else None


def _outlive(run: RunDirectory, lock: Path) -> None:
    """Waits until the launcher has ended, which releases its lock; then stops this attempt of the run."""
    mine = run.written_status()
    locks.wait_until_free(lock)
    status = run.written_status()
    # The launcher may go while this process, whose attempt has ended, shuts down: even if the next one runs already.
    if status is not None and (status.state.ended or (mine is not None and status.attempt != mine.attempt)):
        return
    signals.ask(run, StopRequest("its launcher is gone"))


def _leave(code: int) -> None:
    """Ends this process, at once if it failed: NCCL would wait for the other ranks first, which wait for this one."""
    if code:
        atexit._run_exitfuncs()  # loggers have some
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    warnings.formatwarning = format_warning
    gc.set_threshold(100_000)  # otherwise garbage collection takes a tenth of the import time of PyTorch and Lightning
    _leave(main())
