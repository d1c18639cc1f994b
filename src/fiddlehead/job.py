"""What runs inside a job: `python -m fiddlehead.job RUN/recipe.yaml`.

It needs no launcher: a run can be repeated by hand with that line. The process that is started writes the run's status;
with several processes on a node it starts them, as torchrun does, and they only train.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from fiddlehead.errors import ConfigError, RunError, StopRequested
from fiddlehead.recipe import Recipe
from fiddlehead.runs import RunDirectory, State, exclusive, plain_recipe, this_process


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a saved recipe in its run directory, with as many processes as it says, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fiddlehead.job", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="RUN/recipe.yaml")
    parser.add_argument("--allow", action="append", default=[], metavar="MODULE", help="a module the recipe may import")
    arguments = parser.parse_args(argv)
    run = RunDirectory(arguments.recipe.resolve().parent)

    def work() -> None:
        devices = plain_recipe(run.recipe).get("trainer", {}).get("devices", 1)
        if isinstance(devices, int) and devices > 1 and not _is_worker():
            _start_workers(run, devices, arguments.allow)
        else:
            run_recipe(run.recipe, arguments.allow)

    if _is_worker():
        return _report(work)[0]
    signal.signal(signal.SIGTERM, _stop)
    return execute(run, work)


def run_recipe(file: Path, allow: Sequence[str] = ()) -> None:
    """Loads a recipe, builds its parts and calls its task, in the folder where the recipe is."""
    recipe = Recipe.load(file, allow=tuple(allow))
    recipe.log.dir, recipe.log.name = str(file.resolve().parent.parent), file.resolve().parent.name
    recipe.__fn_or_cls__(**recipe.build_arguments())


def execute(run: RunDirectory, work: Callable[[], None]) -> int:
    """Does `work` as the run's process: its status follows, from RUNNING to how it ended. Returns the exit code."""
    status = this_process(1, "direct")

    def take_over_and_work() -> None:
        nonlocal status
        before = run.written_status()
        if before is not None:
            attempt = before.attempt if before.state is State.SUBMITTED else before.attempt + 1
            status = this_process(attempt, before.executor)
        run.write_status(status)
        work()

    try:
        with exclusive(run):
            exit_code, state, reason = _report(take_over_and_work)
            ended = replace(status, state=state, ended=time.time(), exit_code=exit_code, reason=reason)
            with contextlib.suppress(OSError):  # a full disk; the reason was printed
                run.write_status(ended)
            return exit_code
    except ConfigError as error:  # someone else's run: its status is not touched
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return 2


def _report(work: Callable[[], None]) -> tuple[int, State, str]:
    """Does `work`, prints what went wrong, and returns exit code, state and reason."""
    try:
        work()
    except StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            print(str(stop), flush=True)  # noqa: T201
        return 128 + stop.signum, State.CANCELLED, str(stop)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, State.CANCELLED, "interrupted at once; the checkpoints before it are whole"
    except WorkersFailedError as error:  # they have said so themselves
        return error.exit_code, State.FAILED, str(error)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        _tell_launcher(str(error))
        return 2 if isinstance(error, ConfigError) else 1, State.FAILED, str(error)
    except Exception as error:
        traceback.print_exc()
        _tell_launcher(f"{type(error).__name__}: {error}")
        return 1, State.FAILED, f"{type(error).__name__}: {error}"
    return 0, State.SUCCEEDED, ""


class WorkersFailedError(RunError):
    """One of a node's processes ended with an error, and the others were stopped."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _start_workers(run: RunDirectory, processes: int, allow: Sequence[str]) -> None:
    """Runs `processes` copies of this job on this node and waits for them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=run.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port: two jobs on a node must not collide
        max_restarts=0,
        monitor_interval=0.1,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    options = [option for module in allow for option in ("--allow", module)]
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "fiddlehead.job", str(run.recipe), *options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message if isinstance(failure.message, str) else json.dumps(failure.message)
        code = failure.exitcode if failure.exitcode > 0 else 1
        raise WorkersFailedError(f"rank {rank}: {message}", code) from error
    except SignalException as stop:
        raise StopRequested(stop.sigval, "with all its processes") from stop


def _is_worker() -> bool:
    """Whether torchrun started this process, and so another one is responsible for the run."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _tell_launcher(message: str) -> None:
    """Leaves an error where torchrun looks for it, if this process is one of its workers."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and _is_worker():
        Path(file).write_text(json.dumps({"message": message}))


def _stop(signum: int, frame: FrameType | None) -> None:
    raise StopRequested(signum)


if __name__ == "__main__":
    sys.exit(main())
