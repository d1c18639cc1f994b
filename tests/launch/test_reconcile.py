"""A run's state follows from its own status and its scheduler's answer, by the same rules for all executors."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.launch.reconcile import Answer, Phase, corrected, reconcile
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, StopRequest, this_process

PENDING, RUNNING, INTERRUPTED = (
    Status(state, host="elsewhere", machine="another", reason="why", started=time.time(), submission=1)
    for state in (State.PENDING, State.RUNNING, State.INTERRUPTED)
)
GONE = Answer(Phase.ENDED, "gone")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.mark.parametrize(
    ("status", "answer", "said", "stop", "expected"),
    [
        (RUNNING, Answer(), "", False, (State.RUNNING, None, "why")),
        (PENDING, Answer(Phase.RUNNING, host="n1"), "", False, (State.RUNNING, None, "why")),
        (RUNNING, Answer(Phase.WAITING, "Priority"), "", False, (State.PENDING, None, "Priority; why")),
        (PENDING, GONE, "", False, (State.DIED, None, "gone")),
        (PENDING, GONE, "no Python", False, (State.FAILED, 2, "no Python")),
        (PENDING, GONE, "no Python", True, (State.CANCELLED, None, "cancelled before it began")),
        (RUNNING, GONE, "", True, (State.DIED, None, "gone")),
        (RUNNING, replace(GONE, exit_code=0), "", False, (State.DIED, 1, "gone")),
        (RUNNING, replace(GONE, state=State.CANCELLED, exit_code=15), "", False, (State.CANCELLED, 15, "why")),
        (INTERRUPTED, replace(GONE, exit_code=75), "", False, (State.FAILED, 75, "not queued again: why")),
        (
            INTERRUPTED, replace(GONE, exit_code=75, requeue_limit=True), "", False,
            (State.FAILED, 75, "not queued again (requeue limit reached): why"),
        ),
        (
            RUNNING, replace(GONE, state=State.SUCCEEDED, exit_code=0), "", False,
            (State.SUCCEEDED, 0, "gone, though the run could not write it down"),
        ),
    ],
)  # fmt: skip
def test_a_runs_state_follows_from_its_status_and_the_schedulers_answer(
    status: Status, answer: Answer, said: str, stop: bool, expected: tuple
) -> None:
    found = corrected(status, answer, said, asked_to_stop=stop)
    assert (found.state, found.exit_code, found.reason) == expected


@pytest.mark.parametrize("answer", [Answer(phase) for phase in Phase], ids=lambda answer: answer.phase)
def test_an_end_that_the_run_has_written_counts_whatever_is_answered(run: RunDirectory, answer: Answer) -> None:
    ended = replace(RUNNING, state=State.SUCCEEDED, ended=1.0)
    run.write_status(ended)
    assert reconcile(run, RUNNING, answer) == ended


@pytest.mark.parametrize("answer", [Answer(phase) for phase in Phase], ids=lambda answer: answer.phase)
def test_an_answer_on_an_earlier_submission_says_nothing_of_the_next_one(run: RunDirectory, answer: Answer) -> None:
    again = replace(PENDING, submission=2, attempt=2)
    run.write_status(again)
    assert reconcile(run, RUNNING, answer) == again
    assert reconcile(run, None, answer) == again


def test_a_stop_that_an_earlier_submission_was_asked_for_cancels_nothing(run: RunDirectory) -> None:
    run.write_status(PENDING)
    run.request_stop(StopRequest("cancelled"))
    assert reconcile(run, PENDING, GONE).state is State.CANCELLED  # type: ignore[union-attr]
    again = replace(PENDING, submission=2, attempt=2)
    run.write_status(again)
    assert reconcile(run, again, GONE).state is State.DIED  # type: ignore[union-attr]


def test_a_run_that_has_begun_here_since_its_scheduler_was_asked_goes_on(run: RunDirectory) -> None:
    asked = replace(this_process(1, "local"), state=State.PENDING)
    run.write_status(going := replace(asked, state=State.RUNNING))
    assert reconcile(run, asked, GONE) == going


@pytest.mark.parametrize(("phase", "state"), [(Phase.LAUNCHING, State.PENDING), (Phase.PROCESS, State.RUNNING)])
def test_without_a_job_the_process_that_wrote_the_status_is_looked_at(
    run: RunDirectory, phase: Phase, state: State
) -> None:
    asked = replace(this_process(1, "local"), state=state)
    run.write_status(asked)
    assert reconcile(run, asked, Answer(phase)) == asked
    run.write_status(asked := replace(asked, pid=2**30))
    found = reconcile(run, asked, Answer(phase))
    assert found and found.state is State.DIED and found.ended == asked.started
