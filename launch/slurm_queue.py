"""Slurm's answers about jobs: squeue, sacct and scontrol."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fiddlehead.errors import ConfigError
from fiddlehead.launch.reconcile import Answer, Phase
from fiddlehead.launch.shell import Shell
from fiddlehead.launch.slurm_offer import rows
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status

WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "CONFIGURING"}
SAID_NOTHING = {"BOOT_FAIL", "NODE_FAIL", "LAUNCH_FAILED", "OUT_OF_MEMORY", "RECONFIG_FAIL"}
ENDED = {"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "PREEMPTED", "REVOKED", "TIMEOUT"} | SAID_NOTHING
"""In all other states a job has nodes: RUNNING, COMPLETING, SUSPENDED, ..."""
UNKNOWN = "UNKNOWN"
"""The state of a job that Slurm has forgotten."""
LAG = 60.0
"""Seconds after a run was last heard of in which Slurm need not know its job: squeue may not know it yet, or no more
before sacct does."""

_silent: set[Shell] = set()
"""Machines whose Slurm did not answer when it was last asked."""


@dataclass(frozen=True)
class Job:
    """Slurm's data of a job."""

    state: str
    exit_code: int = 0
    signal: int = 0
    reason: str = ""
    nodes: str = ""

    @property
    def words(self) -> str:
        """State, exit code and reason, in words, if they are known."""
        reason = self.reason if self.reason not in ("", "None", "NonZeroExitCode", "JobLaunchFailure") else ""
        code = f"exit code {self.exit_code}" if self.exit_code else ""
        how = signal.Signals(self.signal).name if self.signal in set(signal.Signals) else ""
        return f"Slurm: {', '.join(filter(None, (self.state, code, how, reason)))}"


def answered(status: Status, job: Job, ended: float | None = None) -> Answer:
    """Translates Slurm's data of a job into the answer for a run that has written `status`."""
    if job.state in WAITING:
        return Answer(Phase.WAITING, job.reason if job.reason != "None" else "")
    if job.state not in ENDED and job.state != UNKNOWN:
        leaving = status.state is State.INTERRUPTED and job.state == "COMPLETING"
        return Answer() if leaving else Answer(Phase.RUNNING, host=job.nodes)
    state, reason = _end(status, job)
    return Answer(
        Phase.ENDED,
        reason,
        state=state,
        exit_code=0 if state is State.SUCCEEDED else job.exit_code or (128 + job.signal if job.signal else 1),
        ended=ended,
        requeue_limit=job.exit_code in (75, 137),
    )


def _end(status: Status, job: Job) -> tuple[State, str]:
    """How a job has ended, and why."""
    if job.state == "CANCELLED":
        dependency = job.reason.startswith("Dependency")
        return State.CANCELLED, "a run that had to succeed first has not" if dependency else "cancelled in Slurm"
    if job.state == UNKNOWN and status.state is State.PENDING:
        return State.CANCELLED, "its job has left Slurm's queue, and never began"
    if job.state == UNKNOWN:
        return State.DIED, "Slurm has forgotten its job, and the run did not say how it ended"
    if job.state == "COMPLETED":  # exit code 0 is that of a run that succeeded; a full disk took no status
        return State.SUCCEEDED, job.words
    if job.exit_code == 130:
        return State.CANCELLED, job.words
    died = job.state in SAID_NOTHING or job.signal or job.exit_code == 137
    return State.DIED if died else State.FAILED, job.words


def find(shell: Shell, ids: Sequence[str]) -> dict[str, Job] | None:
    """Slurm's data of jobs, by number; None, with one warning, if Slurm does not answer.

    It asks squeue first, then sacct, which knows past jobs if there is accounting, then scontrol.

    Raises:
        ConfigError: there is no connection.
    """
    ids = [job_id for job_id in dict.fromkeys(ids) if job_id.isdecimal()]
    if not ids:
        return {}
    answer = _ask(
        shell,
        "squeue --noheader --states=all "
        f"--Format='JobID:|,State:|,exit_code:|,Reason:|,NodeList:|' --jobs={','.join(ids)}",
    )
    if answer is None:
        return None
    jobs = dict.fromkeys(ids, Job(UNKNOWN))
    for job_id, state, code, reason, nodes, _ in rows(answer, 5):
        jobs[job_id] = Job(state, *_exit(int(code)), reason, nodes)
    missing = [job_id for job_id in ids if jobs[job_id].state == UNKNOWN]
    if missing:
        answer = shell.ask(f"sacct -X -n -P -o JobID,State,ExitCode,Reason,NodeList -j {','.join(missing)}")
        for job_id, state, code, reason, nodes in rows(answer.out, 4) if answer.code == 0 else ():
            # "CANCELLED by 1000"; a job that is unknown to squeue has no next attempt.
            jobs[job_id] = Job(state.split()[0], *_pair(code), reason, nodes)
    missing = [job_id for job_id in missing if jobs[job_id].state == UNKNOWN]
    if missing:
        shown = shell.ask(f"for id in {' '.join(missing)}; do scontrol --oneliner show job $id; done 2> /dev/null").out
        for line in shown.splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            code, nodes = _pair(fields["ExitCode"]), fields.get("NodeList", "")
            jobs[fields["JobId"]] = Job(fields["JobState"], *code, fields["Reason"], nodes)
    return jobs


def going(runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    """The runs that have a job and whose own status has not ended."""
    return [run for run in runs if (status := run.written_status()) and not status.state.ended and run.submitted]


def answers(
    shell: Shell, going: Mapping[RunDirectory, Status], fetch: Callable[[Sequence[RunDirectory]], None]
) -> dict[RunDirectory, Answer]:
    """Slurm's answers about the jobs of runs.

    Args:
        fetch: updates the mirrors of runs, after Slurm's answer, so that an end that a run wrote counts.
    """
    submitted = [run for run in going if run.submitted]
    try:
        jobs = find(shell, [run.job_id for run in submitted]) or {}
        fetch(submitted)
    except ConfigError as error:
        unanswered(shell, str(error))
        jobs = {}
    newest = {run: run.written_status() or status for run, status in going.items()}
    return {
        run: _answer(run, status, jobs.get(run.job_id) if run in submitted else None) for run, status in newest.items()
    }


def _answer(run: RunDirectory, status: Status, job: Job | None) -> Answer:
    """The answer about a run's job; None if Slurm said nothing or was not asked."""
    if job is None:
        launching = status.state is State.PENDING and not run.submitted
        return Answer(Phase.LAUNCHING) if launching else Answer()
    ended = _last_sign(run, status)
    if job.state == UNKNOWN and time.time() - ended < LAG:
        return Answer()  # its parts do not know a new job, or one that has just ended, at the same moment
    return answered(status, job, ended)


def unanswered(shell: Shell, said: str) -> None:
    """Warns that only the runs' own status is known; once, until Slurm answers again."""
    if shell not in _silent:
        print(f"WARNING: {shell.name} does not say what has become of its runs: {said}", file=sys.stderr)  # noqa: T201
    _silent.add(shell)


def _ask(shell: Shell, command: str) -> str | None:
    """The output of squeue; None if the controller does not answer."""
    answer = shell.ask(command)
    if answer.code and "Invalid job id" not in answer.error:  # said of one job, but not of several
        unanswered(shell, answer.said)
        return None
    _silent.discard(shell)
    return answer.out


def _pair(code: str) -> tuple[int, int]:
    """Exit code and signal in sacct's notation, `1:0`."""
    number, _, signum = code.partition(":")
    return int(number), int(signum)


def _exit(wait_status: int) -> tuple[int, int]:
    """Exit code and signal in a status that wait(2) returns."""
    return wait_status >> 8, wait_status & 0x7F


def _last_sign(run: RunDirectory, status: Status) -> float:
    """The time of a run's last sign of life, in seconds since the epoch; its submission counts.

    The times of these files are only signs of life: their attempts say to which submission they belong.
    """
    files = (run.log, run.path / "job_id")
    return max(status.ended or status.started, *(file.stat().st_mtime for file in files if file.exists()))
