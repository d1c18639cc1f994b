"""Decides the state of a run from the status that it wrote and its scheduler's answer about its job.

An executor returns only its scheduler's knowledge, as an `Answer`. This module decides the run's state, by the same
rules for all executors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from fiddlehead.run.alive import is_here, last_heard_of
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status


class Phase(StrEnum):
    """Where a job is, as its scheduler sees it."""

    UNKNOWN = "unknown"
    """The run's own status counts: the job exists, or the scheduler does not answer."""
    LAUNCHING = "launching"
    """It is not submitted yet, so its launcher is checked."""
    PROCESS = "process"
    """There is a process but no job: this executor has no scheduler, or the run was started by hand."""
    WAITING = "waiting"
    """It has not begun, or waits again."""
    RUNNING = "running"
    ENDED = "ended"
    """It is over or gone."""


@dataclass(frozen=True)
class Answer:
    """A scheduler's knowledge of a job."""

    phase: Phase = Phase.UNKNOWN
    reason: str = ""
    """Why it waits, or how it has ended, in words."""
    host: str = ""
    """Where it runs."""
    state: State = State.DIED
    """For an ended job: the state of a run whose own status does not say how it ended."""
    exit_code: int | None = None
    ended: float | None = None
    """Seconds since the epoch."""
    requeue_limit: bool = False
    """Whether it has ended because it is not queued again."""


def reconcile(run: RunDirectory, asked: Status | None, answer: Answer) -> Status | None:
    """Returns the state of a run. Its status is read after the scheduler's answer, so an end that the run wrote counts.

    Args:
        asked: the status that the run had written before its scheduler was asked.
    """
    status = run.written_status()
    if status is None or status.state.ended or asked is None or status.submission != asked.submission:
        return status
    begun_since = answer.phase is Phase.ENDED and status != asked and is_here(status)
    if answer.phase is Phase.LAUNCHING:
        found = run.status_of_launch()
    elif answer.phase is Phase.PROCESS or begun_since:
        found = run.status()
    else:
        stop = run.stop_requested_since_submission()
        return corrected(status, answer, run.last_error(), asked_to_stop=stop)
    if found and found.state.ended and found.ended is None:
        found = replace(found, ended=last_heard_of(run.lock, status))
    return found


def corrected(status: Status, answer: Answer, said: str = "", *, asked_to_stop: bool = False) -> Status:
    """The state of a run whose own `status` has not ended.

    Args:
        said: the error of the job's script, if it ended before the run could write its status.
        asked_to_stop: whether the run was asked to stop since it was submitted.
    """
    match answer.phase:
        case Phase.WAITING:
            reason = "; ".join(filter(None, (answer.reason, status.reason)))
            return replace(status, state=State.PENDING, reason=reason)
        case Phase.RUNNING:
            if status.state is State.PENDING:  # the status file is the launcher's, and knows no node
                status = replace(status, host=answer.host, pid=0)
            return replace(status, state=State.RUNNING)
        case Phase.ENDED:
            state, reason = _end(status, answer, said, asked_to_stop=asked_to_stop)
            code = answer.exit_code
            if state is not State.SUCCEEDED and code is not None:
                code = code or 1
            if state is State.FAILED and code is None:
                code = 2  # the exit code of the job's script in this case
            return replace(status, state=state, ended=answer.ended, exit_code=code, reason=reason)
    return status


def _end(status: Status, answer: Answer, said: str, *, asked_to_stop: bool) -> tuple[State, str]:
    """How a run has ended, and why, if its job is over."""
    begun = status.state is not State.PENDING
    if not begun and asked_to_stop:
        return State.CANCELLED, "cancelled before it began"
    if answer.state is State.CANCELLED:
        return answer.state, status.reason or answer.reason
    if status.state is State.INTERRUPTED:
        limit = " (requeue limit reached)" if answer.requeue_limit else ""
        return State.FAILED, f"not queued again{limit}: {status.reason}"
    if answer.state is State.SUCCEEDED:
        return answer.state, f"{answer.reason}, though the run could not write it down"
    if not begun and said:  # the script found no interpreter
        return State.FAILED, said
    return answer.state, said or answer.reason
