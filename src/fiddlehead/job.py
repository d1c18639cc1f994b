"""What runs inside a job: `python -m fiddlehead.job RUN/recipe.yaml`.

It needs no launcher: a run can be repeated by hand with that line. The process that is started writes the run's status;
with several processes on a node it starts them, as torchrun does, and they only train.
"""

from __future__ import annotations

import argparse
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
from fiddlehead.runs import RunDirectory, State, this_process


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a saved recipe in its run directory and returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    parser = argparse.ArgumentParser(prog="python -m fiddlehead.job", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="RUN/recipe.yaml")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="processes on this node")
    parser.add_argument("--allow", action="append", default=[], metavar="MODULE", help="a module the recipe may import")
    arguments = parser.parse_args(argv)
    run = RunDirectory(arguments.recipe.resolve().parent)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _report(lambda: run_recipe(arguments.recipe, arguments.allow))[0]
    if arguments.nproc_per_node > 1:
        return execute(run, lambda: _start_workers(run, arguments.nproc_per_node, arguments.allow))
    return execute(run, lambda: run_recipe(arguments.recipe, arguments.allow))


def run_recipe(file: Path, allow: Sequence[str] = ()) -> None:
    """Loads a recipe, builds its parts and calls its task, in the folder where the recipe is."""
    recipe = Recipe.load(file, allow=tuple(allow))
    recipe.log.dir, recipe.log.name = str(file.resolve().parent.parent), file.resolve().parent.name
    recipe.__fn_or_cls__(**recipe.build_arguments())


def execute(run: RunDirectory, work: Callable[[], None]) -> int:
    """Does `work` as the run's process: its status follows, from RUNNING to how it ended. Returns the exit code."""
    before = run.written_status()
    attempt = 1
    executor = "direct"
    if before is not None:
        attempt = before.attempt if before.state is State.SUBMITTED else before.attempt + 1
        executor = before.executor
    status = this_process(attempt, executor)
    run.write_status(status)
    exit_code, state, reason = _report(work)
    run.write_status(replace(status, state=state, ended=time.time(), exit_code=exit_code, reason=reason))
    return exit_code


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


def _tell_launcher(message: str) -> None:
    """Leaves an error where torchrun looks for it, if this process is one of its workers."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and "TORCHELASTIC_RUN_ID" in os.environ:
        Path(file).write_text(json.dumps({"message": message}))


def _stop(signum: int, frame: FrameType | None) -> None:
    raise StopRequested(signum)


if __name__ == "__main__":
    sys.exit(main())
