"""The interpretation of Slurm's answers, from fake programs that answer as Slurm 22.05 did."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import slurm_offer, slurm_queue
from fiddlehead.launch.reconcile import corrected
from fiddlehead.launch.shell import Shell
from fiddlehead.launch.slurm import _refusal, _would_wait, slurm
from fiddlehead.launch.slurm_offer import count_gpus, gpus_of_a_node, problems, seconds
from fiddlehead.launch.slurm_queue import UNKNOWN, Job, answered, find
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.processes import this_machine
from fiddlehead.run.status import State, Status

HERE = Shell()
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
NO_SUCH_JOB = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NO_CONTROLLER = "echo 'squeue: error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a program answer with what a shell line prints; the others answer that they know nothing."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_queue, "_silent", set())
    (tmp_path / "bin").mkdir()

    def say(program: str, line: str) -> None:
        file = tmp_path / "bin" / program
        file.write_text(f"#!/bin/bash\necho {program} >> {tmp_path}/asked\n{line}\n")
        file.chmod(0o755)

    for program, line in (("squeue", NO_SUCH_JOB), ("sacct", NO_ACCOUNTING), ("scontrol", NO_SUCH_JOB)):
        say(program, line)
    return say


def a_run(folder: Path, state: State = State.RUNNING, job: str = "17", name: str = "run", **words) -> RunDirectory:
    """A run that was submitted, and says that it is in `state`."""
    run = RunDirectory(folder / name)
    run.path.mkdir()
    run.recipe.touch()
    run.command.touch()
    run.write_status(Status(state, executor="slurm", started=time.time(), **words))
    if job:
        (run.path / "job_id").write_text(job + "\n")
    return run


def last_heard_of(run: RunDirectory, seconds: float) -> None:
    """Lets nothing have been heard of a run for so long."""
    then = time.time() - seconds
    status = run.written_status()
    assert status is not None
    run.write_status(replace(status, started=then))
    for file in (run.command, run.path / "job_id"):
        os.utime(file, (then, then))


def state_of(run: RunDirectory) -> Status:
    (status,) = slurm().states([run])
    assert status is not None
    return status


RUNNING, PENDING, INTERRUPTED = (Status(state) for state in (State.RUNNING, State.PENDING, State.INTERRUPTED))


@pytest.mark.parametrize(
    ("status", "job", "state", "reason"),
    [
        (PENDING, Job("PENDING", reason="Resources"), State.PENDING, "Resources"),
        (RUNNING, Job("PENDING", reason="BeginTime"), State.PENDING, "BeginTime"),  # preempted
        (RUNNING, Job("REQUEUE_HOLD", reason="launch failed"), State.PENDING, "launch failed"),
        (PENDING, Job("CONFIGURING"), State.PENDING, ""),
        (PENDING, Job("RUNNING", nodes="node1"), State.RUNNING, ""),
        (INTERRUPTED, Job("COMPLETING"), State.INTERRUPTED, ""),
        (INTERRUPTED, Job("RUNNING"), State.RUNNING, ""),
        (RUNNING, Job("SUSPENDED"), State.RUNNING, ""),
        (RUNNING, Job("A_NEW_WORD"), State.RUNNING, ""),
        (RUNNING, Job("CANCELLED"), State.CANCELLED, "cancelled in Slurm"),
        (PENDING, Job("CANCELLED", reason="DependencyNeverSatisfied"), State.CANCELLED, "had to succeed first"),
        (RUNNING, Job("TIMEOUT", reason="TimeLimit"), State.FAILED, "TIMEOUT, TimeLimit"),
        (RUNNING, Job("FAILED", exit_code=3, reason="NonZeroExitCode"), State.FAILED, "FAILED, exit code 3"),
        (RUNNING, Job("FAILED", signal=9), State.DIED, "FAILED, SIGKILL"),
        (RUNNING, Job("FAILED", exit_code=137), State.DIED, "exit code 137"),
        (RUNNING, Job("FAILED", exit_code=130), State.CANCELLED, "exit code 130"),
        (RUNNING, Job("NODE_FAIL"), State.DIED, "NODE_FAIL"),
        (RUNNING, Job("OUT_OF_MEMORY", signal=125), State.DIED, "OUT_OF_MEMORY"),
        (RUNNING, Job("PREEMPTED"), State.FAILED, "PREEMPTED"),  # and not queued again
        (RUNNING, Job("COMPLETED"), State.SUCCEEDED, "COMPLETED"),
        (INTERRUPTED, Job("FAILED", exit_code=75), State.FAILED, "requeue limit reached"),
        (INTERRUPTED, Job("CANCELLED"), State.CANCELLED, ""),
        (PENDING, Job(UNKNOWN), State.CANCELLED, "never began"),
        (RUNNING, Job(UNKNOWN), State.DIED, "forgotten"),
    ],
    ids=str,
)
def test_slurms_state_corrects_the_runs_status(status: Status, job: Job, state: State, reason: str):
    found = corrected(status, answered(status, job))
    assert found.state is state and reason in found.reason
    if state.ended:
        assert (found.exit_code == 0) == (state is State.SUCCEEDED)


def test_why_it_waits_again_is_said():
    interrupted = Status(State.INTERRUPTED, reason="stopped after step 7: SIGUSR1")
    for said, reason in (("None", interrupted.reason), ("BeginTime", "BeginTime; " + interrupted.reason)):
        assert corrected(interrupted, answered(interrupted, Job("PENDING", reason=said))).reason == reason


def test_one_question_for_many_runs(tmp_path: Path, answer):
    rows = [f"{number}|RUNNING|0|None|node1|" for number in range(1, 31)]
    answer("squeue", "printf '%s\\n' " + " ".join(f"'{row}'" for row in ["Welcome to the cluster!", *rows]))
    runs = [a_run(tmp_path, job=str(number), name=f"run-{number}") for number in range(1, 31)]
    assert [status and status.state for status in slurm().states(runs)] == [State.RUNNING] * 30
    assert (tmp_path / "asked").read_text().split() == ["squeue"]


def test_a_run_that_has_ended_by_its_own_word_asks_nobody(tmp_path: Path, answer):
    assert state_of(a_run(tmp_path, State.SUCCEEDED)).state is State.SUCCEEDED
    assert not (tmp_path / "asked").exists()


def test_accounting_knows_the_past(tmp_path: Path, answer):
    run = a_run(tmp_path)
    answer("sacct", "echo '17|CANCELLED by 1000|0:15|None|node1'")
    assert state_of(run).state is State.CANCELLED
    answer("sacct", "echo '17|OUT_OF_MEMORY|0:125|OutOfMemory|node1'")
    assert state_of(run).state is State.DIED
    assert "OUT_OF_MEMORY" in state_of(run).reason


def test_a_requeued_job_is_not_in_the_state_that_accounting_has_for_its_last_attempt(tmp_path: Path, answer):
    answer("squeue", "echo '17|PENDING|0|BeginTime||'")
    answer("sacct", "echo '17|PREEMPTED|0:0|None|node1'")
    assert state_of(a_run(tmp_path)).state is State.PENDING


def test_without_accounting_the_controller_is_asked(tmp_path: Path, answer):
    answer(
        "scontrol", "echo 'JobId=17 JobName=a run JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0 NodeList=node1'"
    )
    status = state_of(a_run(tmp_path))
    assert (status.state, status.exit_code) == (State.FAILED, 3)
    assert (tmp_path / "asked").read_text().split() == ["squeue", "sacct", "scontrol"]


def test_a_job_that_slurm_has_forgotten_has_ended(tmp_path: Path, answer):
    began, waited = a_run(tmp_path), a_run(tmp_path, State.PENDING, job="18", name="waited")
    for run in (began, waited):
        last_heard_of(run, slurm_queue.LAG + 1)
    assert state_of(began).state is State.DIED
    assert state_of(waited).state is State.CANCELLED
    assert state_of(began).ended == state_of(began).ended  # and not the time of the question


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING, State.INTERRUPTED])
def test_a_job_that_slurm_does_not_know_for_a_moment_has_not_ended(tmp_path: Path, answer, state: State):
    """sbatch has answered before squeue knows the job; or squeue forgets it before sacct knows of it."""
    run = a_run(tmp_path, state)
    assert state_of(run).state is state
    last_heard_of(run, slurm_queue.LAG - 10)
    assert state_of(run).state is state
    last_heard_of(run, slurm_queue.LAG + 1)
    assert state_of(run).state.ended
    run.log.write_text("step 1\n")  # so it has run a moment ago
    assert state_of(run).state is state
    answer("sacct", "echo '17|COMPLETED|0:0|None|node1'")
    assert state_of(run).state is (State.FAILED if state is State.INTERRUPTED else State.SUCCEEDED)


def test_a_launcher_that_hands_over_and_leaves_while_it_is_looked_at_has_not_died(tmp_path: Path, monkeypatch):
    run = a_run(tmp_path, State.PENDING, job="", machine=this_machine(), pid=2**30, process_started=1)
    looked = RunDirectory.status

    def hand_over(self: RunDirectory) -> Status | None:
        (run.path / "job_id").write_text("17\n")
        return looked(self)

    monkeypatch.setattr(RunDirectory, "status", hand_over)
    assert state_of(run).state is State.PENDING


def test_a_controller_that_does_not_answer_is_warned_of_once(tmp_path: Path, answer, capsys):
    answer("squeue", NO_CONTROLLER)
    run = a_run(tmp_path)
    for _ in range(3):
        assert state_of(run).state is State.RUNNING
    assert capsys.readouterr().err.count("WARNING") == 1
    answer("squeue", "echo '17|RUNNING|0|None|node1|'")
    state_of(run)
    answer("squeue", NO_CONTROLLER)
    state_of(run)
    assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert find(HERE, []) == {}


def test_the_job_of_an_earlier_submission_is_not_asked_for(tmp_path: Path, answer):
    answer("squeue", "echo '17|FAILED|256|NonZeroExitCode|node1|'")
    run = a_run(tmp_path, State.PENDING, host="elsewhere")
    assert state_of(run).state is State.FAILED
    run.write_status(Status(State.PENDING, executor="slurm", host="elsewhere", started=time.time(), submission=2))
    assert state_of(run).state is State.PENDING


def test_the_error_of_the_jobs_script_is_its_reason(tmp_path: Path, answer):
    answer("squeue", "echo '17|FAILED|512|NonZeroExitCode|node1|'")
    run = a_run(tmp_path, State.PENDING)
    run.log.write_text("=== started\nerror: executor.python: there is no Python /x on node1\n")
    status = state_of(run)
    assert (status.exit_code, status.reason) == (2, "executor.python: there is no Python /x on node1")


def test_secrets_go_when_slurm_says_that_the_run_has_ended(tmp_path: Path, answer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", str(tmp_path / "secrets"))
    executor, run = slurm(), a_run(tmp_path)
    file = Path(executor.deliver_secrets(run, {"KEY": "x"}))
    answer("squeue", "echo '17|RUNNING|0|None|node1|'")
    executor.states([run])
    assert file.exists()
    answer("squeue", "echo '17|CANCELLED|0|None|node1|'")
    executor.states([run])
    assert not file.exists()


# --- what Slurm's programs are told

CONFIGURATION = {"SLURM_CONF": "/nowhere/slurm.conf", "SLURM_JWT": "token"}
SETTINGS = {
    "SBATCH_PARTITION": "urgent", "SBATCH_TIMELIMIT": "7", "SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE",
    "SLURM_CLUSTERS": "other", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "3", "SINFO_FORMAT": "%N", "SQUEUE_STATES": "all",
    "SACCT_FORMAT": "jobid", "SALLOC_PARTITION": "urgent", "SRUN_CPUS_PER_TASK": "4", "WANDB_API_KEY": "secret",
}  # fmt: skip


def test_the_environment_does_not_change_what_was_checked(tmp_path: Path, answer, nemo_run, monkeypatch):
    for name, value in (CONFIGURATION | SETTINGS).items():
        monkeypatch.setenv(name, value)
    for program in ("sbatch", "squeue", "sinfo"):
        answer(program, f"env > {tmp_path}/{program}.env; echo 17")
    run = a_run(tmp_path)
    assert slurm().submit(run) == "17"
    slurm().states([run])
    problems(slurm().shell(), None, None, 1, "60", None)
    for program in ("sbatch", "squeue", "sinfo"):
        seen = dict(
            line.split("=", 1) for line in (tmp_path / f"{program}.env").read_text().splitlines() if "=" in line
        )
        assert seen["PATH"] and {name: seen.get(name) for name in CONFIGURATION} == CONFIGURATION
        secret = set() if program == "sbatch" else {"WANDB_API_KEY"}  # which only sbatch hands on to jobs
        assert set(SETTINGS) & set(seen) == secret


def test_what_is_withheld_from_sbatch_is_named(answer, monkeypatch: pytest.MonkeyPatch, capsys):
    slurm_offer.warn_of_settings(slurm().shell())
    assert not capsys.readouterr().err
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    slurm_offer.warn_of_settings(slurm().shell())
    assert "does not get SBATCH_PARTITION, SLURM_CLUSTERS of" in capsys.readouterr().err


# --- what a cluster has to offer

SINFO = (
    "printf '%s\\n' 'cpu*|1-00:00:00|9|(null)|up|idle' 'h100|infinite|4|gpu:h100:8(S:0-1)|up|alloc' "
    "'h100|infinite|2|gpu:4|up|mix-'"
)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((None, None, 9, "1-0", None), []),
        (("h100", None, 4, "UNLIMITED", 8), []),
        (
            ("h10", None, 1, "1:00:00", None),
            ["executor.partition='h10': unknown partition 'h10'; did you mean 'h100'?"],
        ),
        ((None, None, 1, "2-0", None), ["executor.time='2-0': partition 'cpu' allows 1-00:00:00"]),
        (("cpu", None, 10, "60", None), ["executor.nodes=10: partition 'cpu' has 9"]),
        (("cpu", None, 1, "60", 1), ["executor.gpus_per_node=1: the nodes of partition 'cpu' have at most 0"]),
        (("h100", None, 5, "60", 8), ["executor.nodes=5: partition 'h100' has 4 with 8 GPUs"]),
        (
            ("cpu", "reserch", 1, "60", None),
            ["executor.account='reserch': unknown account 'reserch'; did you mean 'research'?"],
        ),
    ],
    ids=str,
)
def test_problems_name_the_setting(answer, asked, said: list[str]):
    answer("sinfo", SINFO)
    answer("sacctmgr", "printf '%s\\n' research teaching research")
    assert problems(HERE, *asked) == said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("cpu,h100", None, 4, "UNLIMITED", 8), []),  # one that can is enough
        (("h100, cpu", None, 1, "60", None), []),
        (("cpu,h10", None, 1, "60", None), ["executor.partition='h10': unknown partition 'h10'; did you mean 'h100'?"]),
        (("cpu,h100", None, 20, "2-0", 8), 3),
        ((",", None, 1, "60", None), ["executor.partition=',': names no partition; allowed: cpu, h100"]),
    ],
    ids=str,
)
def test_several_partitions_may_be_named(answer, asked, said: list[str] | int):
    answer("sinfo", SINFO)
    found = problems(HERE, *asked)
    assert (len(found) if isinstance(said, int) else found) == said


def test_hidden_partitions_are_known(answer):
    answer("sinfo", """case " $* " in *" --all "*) echo 'secret|infinite|1|gpu:2|up|idle~' ;; esac""")
    assert problems(HERE, "secret", None, 1, "60", 2) == []


@pytest.mark.parametrize("state", ["drain", "drng", "down*", "idle*", "resv", "maint", "unk", "idle$"])
def test_a_job_that_waits_for_nodes_that_are_away_is_not_refused(tmp_path: Path, answer, nemo_run, state: str):
    """sbatch --test-only says of it what it says of a job that can never start."""
    answer("sbatch", "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1")
    run = a_run(tmp_path)
    answer("sinfo", f"printf '%s\\n' 'batch*|infinite|1|gpu:4|up|{state}' 'batch*|infinite|1|gpu:4|up|idle'")
    slurm(nodes=2).check(run)
    answer("sinfo", "echo 'batch*|infinite|2|gpu:4|up|idle~'")
    with pytest.raises(ConfigError, match="sbatch refuses the job: Requested node configuration is not available"):
        slurm(nodes=2).check(run)


def test_all_gpus_of_a_node(answer):
    answer("sinfo", SINFO)
    assert gpus_of_a_node(HERE, "h100", 4) == 8
    assert gpus_of_a_node(HERE, "h100", 5) == 4  # each of five nodes has
    assert gpus_of_a_node(HERE, None, 1) == 0


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("gpu", 1), ("gpu:4", 4), ("gpu:a100", 1), ("gpu:a100:4(S:0-1),shard:8", 4), ("gpu:a:2,gpu:b:3", 5),
     ("(null)", 0), ("shard:4", 0), ("mygpu:4", 0), ("", 0)],
)  # fmt: skip
def test_gpus_among_generic_resources(gres: str, gpus: int):
    assert count_gpus(gres) == gpus


def test_several_problems_at_once(answer):
    answer("sinfo", SINFO)
    answer("sacctmgr", NO_ACCOUNTING)
    assert len(problems(HERE, "cpu", "anything", 10, "2-0", None)) == 2


@pytest.mark.parametrize(
    ("time", "limit"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-6", 108000), ("1-6:30", 109800), ("1-0:0:1", 86401),
     ("UNLIMITED", None), ("infinite", None), ("0", None)],
)  # fmt: skip
def test_times_are_read_as_sbatch_reads_them(time: str, limit: int | None):
    assert seconds(time) == limit


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "-5", "1-"])
def test_invalid_time_limits_are_refused(time: str):
    with pytest.raises(ConfigError, match=r"^time="):
        seconds(time)


def test_a_refusal_is_readable():
    said = "sbatch: error: invalid partition specified: nope\nallocation failure: Invalid partition name specified\n"
    reasons = "invalid partition specified: nope; Invalid partition name specified"
    assert _refusal(said) == f"executor: sbatch refuses the job: {reasons}"
    assert not _would_wait(said)


@pytest.mark.parametrize(
    "said", ["Requested nodes are busy", "Required node not available (down, drained or reserved)"]
)
def test_a_job_that_would_wait_is_not_refused(said: str):
    assert _would_wait(f"allocation failure: {said}")
    assert not _would_wait("allocation failure: Requested node configuration is not available")
