"""The local executor: NeMo-Run's LocalExecutor starts the job, which then runs without NeMo-Run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path
from fiddlehead.launch import nemo
from fiddlehead.launch.executor import Executor, where_process
from fiddlehead.launch.reconcile import Answer, Phase
from fiddlehead.run.alive import MISSING, alive, is_here, last_heard_of, way_out
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.processes import is_running
from fiddlehead.run.processes import started as process_started
from fiddlehead.run.status import State, Status


def local(ntasks_per_node: int = 0, **settings: Any) -> LocalExecutor:
    """Processes on this machine, with the environment of this process.

    Args:
        ntasks_per_node: the number of processes, each with its own device; 0 follows `trainer.devices`.
        settings: other settings of `LocalExecutor`.

    Raises:
        ConfigError: a setting is unknown, or has an impossible value.
    """
    return LocalExecutor.of(ntasks_per_node=ntasks_per_node, **settings)


@dataclass(frozen=True, kw_only=True)
class LocalExecutor(Executor):
    """Processes on this machine. A job's id is its process's number and start, as `processes.started` has it."""

    nodes: int = 1

    kind: ClassVar[str] = "local"
    ships_code: ClassVar[bool] = False
    begins_at_once: ClassVar[bool] = True

    @property
    def is_plain(self) -> bool:
        """Whether the settings are the defaults: no commands or variables of its own, and no other Python."""
        return not (self.setup_lines or self.python or self.env_vars)

    @classmethod
    def where(cls, run: RunDirectory, status: Status) -> str:
        """The machine, and the process."""
        return where_process(status)

    def problems(self) -> list[Problem]:
        """As `Executor.problems`."""
        more = [Problem("nodes", self.nodes, "there is one machine here", (1,))] if self.nodes > 1 else []
        return [*super().problems(), *more]

    def deliver_secrets(self, run: RunDirectory, values: Mapping[str, str]) -> str:
        """Nothing has to be delivered: the job inherits them."""
        return ""

    def secrets_file(self, run: RunDirectory) -> str:
        """As `Executor.secrets_file`: there is none."""
        return ""

    def check(self, run: RunDirectory) -> None:
        """Looks for the interpreter, unless `setup_lines` may provide it.

        Raises:
            ConfigError: it does not exist.
        """
        if self.python and not self.setup_lines and not shutil.which(user_path(self.python)):
            message = f"there is no such program on {socket.gethostname()}"
            raise ConfigError(Problem("executor.python", self.python, message))

    def submit(self, run: RunDirectory, *, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
        """Starts `run.script` in a new session; returns the process's id and start time.

        Raises:
            ConfigError: it should wait for another job, which this executor cannot do.
        """
        if after or after_any:
            raise ConfigError(Problem("executor", "local", "starts a job at once; the launcher waits for a run"))
        pid = nemo.start_process(run.name, run.script, run.path / "nemo_run")
        return f"{pid}:{process_started(pid) or 0}"

    def ask(self, going: Mapping[RunDirectory, Status]) -> Mapping[RunDirectory, Answer]:
        """Looks at the processes of jobs that have not begun; afterwards the run's own status counts."""
        return {run: _answer(run, status) for run, status in going.items()}

    def kill(self, run: RunDirectory) -> None:
        """Kills a run's processes without saving; the last checkpoint stays complete.

        Raises:
            ConfigError: they are on another machine or in another container.
        """
        status = run.written_status()
        if status is None or status.state.ended:
            return
        if not is_here(status):
            raise ConfigError(
                f"run {run.name!r} is on {status.host}, and can be killed there only; {way_out(run.name)}"
            )
        if status.state is State.PENDING:
            pid, running = _job(run)
            pid = pid if running else 0
        else:
            pid = status.pid if alive(run.lock, status) else 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                # With its workers, unless it was started by hand, in the group of a shell's script.
                kill = os.killpg if os.getpgid(pid) == pid else os.kill
                kill(pid, signal.SIGKILL)


def _answer(run: RunDirectory, status: Status) -> Answer:
    """The state of a run's job between its submission and its first status."""
    if status.state is not State.PENDING or not is_here(status):
        return Answer(Phase.PROCESS)
    if not run.submitted:
        return Answer(Phase.LAUNCHING)
    _, running = _job(run)
    if running is None:
        running = time.time() - last_heard_of(run.lock, status) < MISSING
    if running:
        return Answer(Phase.WAITING)
    return Answer(Phase.ENDED, "its process is gone, before the job began", ended=time.time())


def _job(run: RunDirectory) -> tuple[int, bool | None]:
    """The id of the process that was started for a run, and whether it runs; None if the system does not say.

    The id may belong to another process by now. The process's name says nothing, because it becomes several programs in
    turn.
    """
    match = re.fullmatch(r"(\d+):(\d+)", run.job_id)
    return (int(match[1]), is_running(int(match[1]), int(match[2]))) if match else (0, False)
