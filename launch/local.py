"""This machine: NeMo-Run's LocalExecutor starts the job, and this file lets it outlive the launcher or die with it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddlehead.runs import RunDirectory, State, Status, alive

if TYPE_CHECKING:
    from nemo_run import Executor, Experiment, LocalExecutor

FOLLOW_RECIPE = 0
"""`ntasks_per_node` of an executor that starts as many processes as the recipe's trainer has devices."""


def local(ntasks_per_node: int = FOLLOW_RECIPE, env_vars: dict[str, str] | None = None) -> LocalExecutor:
    """Processes on this machine.

    Args:
        ntasks_per_node: how many, each with a device of its own; 0 follows `trainer.devices`.
        env_vars: environment variables for the job, beside those of this process.
    """
    import nemo_run

    return nemo_run.LocalExecutor(ntasks_per_node=ntasks_per_node, env_vars=env_vars or {})


def job_script(run: RunDirectory, modules: Sequence[str]) -> str:
    """The shell script that runs a job under this interpreter, its output in the run's log."""
    command = [sys.executable, "-u", "-m", "fiddlehead.job", str(run.recipe)]
    command += [option for module in modules for option in ("--allow", module)]
    return f"exec {shlex.join(command)} >> {shlex.quote(str(run.log))} 2>&1\n"


def submit(run: RunDirectory, executor: Executor, modules: Sequence[str], *, detach: bool) -> None:
    """Starts the job of a prepared run, and unless detached shows its output until it ends.

    Ctrl-C, or SIGTERM to this process, cancels the job: it saves its last step and ends.
    """
    import nemo_run

    script = nemo_run.Script(inline=job_script(run, modules))
    experiment = nemo_run.Experiment(
        run.name,
        executor=executor,
        base_dir=str(run.path / "nemo_run"),
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,  # they would hold the environment variables
    )
    log_start = run.log.stat().st_size if run.log.exists() else 0
    with experiment:
        experiment.add(script, name="job")
        experiment.run()
        handle = experiment.jobs[0].handle
        experiment.detach = True  # only that leaving this block does not wait: it is done below, or not at all
        if detach:
            # Until the job has taken the run over, its status names this process, which is about to end.
            while (status := run.written_status()) and status.state is State.SUBMITTED and _running(experiment, handle):
                time.sleep(0.1)
            _outlive(experiment)
            return
        previous = signal.signal(signal.SIGTERM, _interrupt)
        output = _follow(run.log, log_start)
        try:
            while _running(experiment, handle):
                _show(output)
                time.sleep(0.1)
        except KeyboardInterrupt:
            _show(output)
            print("cancelling: the last step is being saved", flush=True)  # noqa: T201
            experiment._runner.cancel(handle)  # SIGTERM, and SIGKILL if that is not enough in 10 s
        finally:
            signal.signal(signal.SIGTERM, previous)
        _show(output)


def cancel(status: Status, patience: float = 10.0) -> bool:
    """Asks a local run's process to save its last step and end; kills it if it has not after `patience` seconds.

    Returns whether it ended by itself.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(status.pid, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while alive(status):
            if time.monotonic() > deadline:
                # Its own group if it leads one: a direct run shares that of the shell or notebook it was started from.
                kill = os.killpg if os.getpgid(status.pid) == status.pid else os.kill
                kill(status.pid, signal.SIGKILL)
                return False
            time.sleep(0.1)
    return True


def _running(experiment: Experiment, handle: str) -> bool:
    from torchx.specs import is_terminal

    status = experiment._runner.status(handle)
    return status is not None and not is_terminal(status.state)


def _outlive(experiment: Experiment) -> None:
    """Keeps NeMo-Run, whose local scheduler ends its jobs with itself, from ending this one."""
    scheduler: Any = experiment._runner._scheduler("local_persistent")
    for app in scheduler._apps.values():
        for replicas in app.role_replicas.values():
            for replica in replicas:
                if replica.combined:
                    replica.combined.close()  # threads that copy the output would keep this process from leaving
    scheduler.close = lambda: None


def _follow(file: Path, position: int) -> Iterator[str]:
    """Yields what is appended to `file` after `position`, "" when there is nothing new."""
    while not file.exists():
        yield ""
    with file.open(errors="replace") as stream:
        stream.seek(position)
        while True:
            yield stream.read()


def _show(output: Iterator[str]) -> None:
    sys.stdout.write(next(output))
    sys.stdout.flush()


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt
