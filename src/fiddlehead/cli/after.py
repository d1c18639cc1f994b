"""The runs that a run waits for: `--after RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiddlehead.errors import ConfigError, Problem

if TYPE_CHECKING:
    from fiddlehead.launch.executor import Executor
    from fiddlehead.run.directory import RunDirectory


def unfinished(names: Sequence[str], directory: str) -> list[RunDirectory]:
    """The runs to wait for, without those that have succeeded already.

    Raises:
        ConfigError: one has ended otherwise.
    """
    from fiddlehead.launch import watch
    from fiddlehead.run.names import find_run
    from fiddlehead.run.status import State

    waiting = []
    for run in [find_run(name, directory) for name in names]:
        (status,) = watch.states([run])
        if status is None or (status.state.ended and status.state is not State.SUCCEEDED):
            said = f"it is {status.state if status else 'no run that began'}"
            raise ConfigError(Problem(f"--after {run.name}", message=said))
        if not status.state.ended:
            waiting.append(run)
    return waiting


def in_queue_of(run: RunDirectory, executor: Executor) -> bool:
    """Whether the run is in the queue of `executor`, which can then wait for it."""
    from fiddlehead.launch import watch

    theirs = watch.load_executor(run)
    return executor.queues and theirs is not None and theirs.queue() == executor.queue()


def wait_for(runs: Sequence[RunDirectory]) -> None:
    """Waits until all have succeeded.

    Raises:
        ConfigError: one has not.
    """
    from fiddlehead.launch import watch
    from fiddlehead.run.status import State

    for run in runs:
        print(f"waiting for {run.name}", flush=True)  # noqa: T201
        status = watch.wait(run)
        if status is None or status.state is not State.SUCCEEDED:
            said = f"it ended {status.state if status else ''}, so this run never began"
            raise ConfigError(Problem(f"--after {run.name}", message=said))
