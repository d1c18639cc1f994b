"""What the files `status` and `stop` of a run say.

`RunDirectory.write_status` and `RunDirectory.request_stop` write them; `fiddlehead.run` says which process does so, and
when.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from enum import StrEnum

from fiddlehead.run.processes import started as process_started
from fiddlehead.run.processes import this_machine


class State(StrEnum):
    """The state of a run."""

    PENDING = "PENDING"
    """Handed over, or requeued, and has not begun."""
    RUNNING = "RUNNING"
    INTERRUPTED = "INTERRUPTED"
    """The job has saved its last step and left before its end, to be requeued."""
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    DIED = "DIED"
    """The process ended without writing a status: killed, out of memory, or the machine went down."""
    DAMAGED = "DAMAGED"
    """Its status cannot be read; never written."""

    @property
    def ended(self) -> bool:
        """Whether the run has ended: nothing more happens without a new attempt."""
        return self not in (State.PENDING, State.RUNNING, State.INTERRUPTED)


@dataclass(frozen=True)
class Status:
    """The content of a run's `status` file, written by whoever is responsible for the run at the moment."""

    state: State
    host: str = ""
    machine: str = ""
    """`this_machine` of the process, by which it is found when the host has another name."""
    pid: int = 0
    process_started: int = 0
    """When the process began, as `processes.started` says: a pid alone may since belong to another process."""
    attempt: int = 1
    submission: int = 0
    """The attempt with which the run was last handed over: a job that is queued again makes more of them. It tells
    whether `job_id` and a stop request are of that submission or of one before; 0 is not known."""
    started: float = 0.0
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""
    executor: str = "direct"
    failures: int = 0
    """The number of failures in a row at `failed_step`."""
    failed_step: int = -1


@dataclass(frozen=True)
class StopRequest:
    """That a run shall save the step in hand and leave; the content of its `stop` file."""

    reason: str
    requeue: bool = False
    """Whether it is to go on later, or is cancelled."""
    attempt: int = 0
    """The attempt that was running or waiting when the request was made; 0 if unknown."""


def this_process(attempt: int, executor: str) -> Status:
    """The status of a run for which this process is responsible from now on."""
    return Status(
        State.RUNNING,
        host=socket.gethostname(),
        machine=this_machine(),
        pid=os.getpid(),
        process_started=process_started(os.getpid()) or 0,
        attempt=attempt,
        started=time.time(),
        executor=executor,
    )
