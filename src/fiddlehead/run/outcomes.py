"""Notes of failed processes of a run, which they leave in its directory.

The other processes see only that a partner is gone, and may wait for it for a long time. So the process that knows the
reason writes it down, for the other nodes and for the run's status. The job's number shows to which attempt a note
belongs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fiddlehead.errors import RunError, StopRequested
from fiddlehead.files.atomic import write_atomically
from fiddlehead.run.directory import RunDirectory

STOPPED = (75, 130)
"""Exit codes of a process that was asked to stop (`StopRequested.exit_code`)."""
FIRST = ("rank 0", "node 0")
"""Whose output is the run's log."""
_SUFFIX = ".outcome"


@dataclass(frozen=True)
class Outcome:
    """How a process of an attempt has ended."""

    job: str
    who: str
    """`rank 3`, or `node 1` for the process that starts those of a node."""
    host: str
    exit_code: int
    reason: str
    final: bool
    time: float


class WorkersFailedError(RunError):
    """One of the processes ended with an error, and the others were ended.

    Args:
        exit_code: that process's.
        final: whether another attempt would end in the same way.
    """

    def __init__(self, message: str, exit_code: int, *, final: bool) -> None:
        super().__init__(message)
        self.exit_code, self.final = exit_code, final


def leave(run: RunDirectory, who: str, exit_code: int, reason: str, *, final: bool = False) -> None:
    """Tells the other processes that, and how, one has ended; a full disk keeps it from them."""
    outcome = Outcome(_job(), who, socket.gethostname(), exit_code, reason, final, time.time())
    with contextlib.suppress(OSError):
        run.logs.mkdir(exist_ok=True)
        write_atomically(run.logs / f"{who.replace(' ', '-')}{_SUFFIX}", json.dumps(asdict(outcome)) + "\n")


def read(run: RunDirectory) -> list[Outcome]:
    """The outcomes of the failed processes of this attempt, the earliest first."""
    found = []
    for file in run.logs.glob(f"*{_SUFFIX}"):
        # Deleted by the first node, which tidies up; or spoiled, and of an attempt that is over, as each is whole.
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Outcome(**json.loads(file.read_text())))
    return sorted((outcome for outcome in found if outcome.job == _job()), key=lambda outcome: outcome.time)


def forget(run: RunDirectory) -> None:
    """Deletes what other attempts have left; for the process that is responsible for the run."""
    for file in run.logs.glob(f"*{_SUFFIX}"):
        # A queued job's restarts have numbers, so what has this one's is another node's, which was faster.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if "SLURM_JOB_ID" in os.environ and json.loads(file.read_text())["job"] == _job():
                continue
        file.unlink(missing_ok=True)


def conclusion(run: RunDirectory) -> StopRequested | WorkersFailedError | None:
    """The common outcome of all processes; None if none has left one."""
    left = read(run)
    stops = [outcome for outcome in left if outcome.exit_code in STOPPED]
    failures = [outcome for outcome in left if outcome not in stops]
    # The first rank saves, so its word counts. What fails after a stop has lost its partners, and could not know why.
    stop = next((outcome for outcome in stops if outcome.who in FIRST), None)
    if stop is None and stops and left[0] in stops and not any(failure.final for failure in failures):
        stop = stops[0]
    if stop is not None:
        return StopRequested(stop.reason, requeue=stop.exit_code == 75)
    if not failures:
        return None
    # A process that is killed is not quick to say so: those that miss it fail, and say so, at once.
    cause = min(failures, key=lambda failure: failure.exit_code >= 0)
    return WorkersFailedError(
        f"{cause.who} on {cause.host}: {cause.reason} ({log_of(run, cause.who)})",
        max(1, cause.exit_code),
        final=cause.final,
    )


def own_name() -> str:
    """The name of this process in its outcome."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"rank {os.environ['RANK']}"
    return f"node {os.environ.get('SLURM_NODEID', '0')}"


def alone() -> bool:
    """Whether no other process needs the outcome: this one trains alone, or has started all the others."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.environ["WORLD_SIZE"] == "1"
    return os.environ.get("SLURM_NNODES", "1") == "1"


def log_of(run: RunDirectory, who: str) -> Path:
    """What `rank 3` prints, or the process of `node 1`."""
    return run.log if who in FIRST else run.logs / f"{who.replace(' ', '-')}.txt"


def _job() -> str:
    """Identifies the processes of this attempt on all nodes."""
    return f"{os.environ.get('SLURM_JOB_ID', 'job')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
