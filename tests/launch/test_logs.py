"""The logs of a run: which output is of which attempt, and of which process."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import logs
from fiddlehead.run.directory import RunDirectory, last_lines
from tests.launch.test_watch import started


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "a")
    made.logs.mkdir(parents=True)
    return made


def attempt_of(run: RunDirectory, files: dict[str, Path], attempt: str = "") -> str:
    """What is printed of an attempt."""
    out = io.StringIO()
    assert logs.print_attempt(run, files, attempt, out) == bool(out.getvalue())
    return out.getvalue()


def test_an_attempt_that_a_process_missed_is_not_taken_for_another(run: RunDirectory):
    """The second process of the first attempt had begun; in the second one it had not, and in the third one again."""
    jobs = ["slurm job 7", "slurm job 7, restart 1", "slurm job 8"]
    run.log.write_text("".join(f"{started(hour, job)}{hour}\n" for hour, job in enumerate(jobs)))
    other = run.logs / "rank-1.txt"
    # The clock of its node is an hour behind.
    other.write_text(f"{started(0, 'rank 1 of 2, ' + jobs[0])}first\n{started(1, 'rank 1 of 2, ' + jobs[2])}third\n")
    files = logs.log_files(run, "1")
    said = [attempt_of(run, files, number).splitlines()[1:] for number in ("1", "2", "3", "")]
    assert said == [["first"], [], ["third"], ["third"]]
    with pytest.raises(ConfigError, match=r"--attempt 4: .*log\.txt has 3"):
        attempt_of(run, files, "4")


def test_a_log_larger_than_memory_is_printed_block_by_block(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    """Whatever falls on the border between two blocks: a character, a line, the beginning of an attempt."""
    lines = [f"{'für' * (number % 7)} {number}\n" for number in range(200)]
    attempts = [started(hour, "local") + "".join(lines) for hour in (1, 2)]
    run.log.write_text("".join(attempts) + "no end")
    for block in (7, 16, 64, 1000):
        monkeypatch.setattr(logs, "BLOCK", block)
        if block > 60:  # the first line of an attempt is one
            assert attempt_of(run, {"": run.log}, "1") == attempts[0]
            assert attempt_of(run, {"": run.log}) == attempts[1] + "no end"
        prefixed = "".join("> " + line for line in ("".join(attempts) + "no end").splitlines(keepends=True))
        assert attempt_of(run, {"> ": run.log}, "all") == prefixed
    tracemalloc.start()
    monkeypatch.undo()
    with run.log.open("a") as log:
        for _ in range(16):
            log.write("x" * 1_000_000 + "\n")
    with open(os.devnull, "w") as out:
        logs.print_attempt(run, {"[rank 0] ": run.log}, out=out)
    assert tracemalloc.get_traced_memory()[1] < 12_000_000
    tracemalloc.stop()
    assert len(last_lines(run.log, 3)[-1]) < 70_000


def test_on_one_machine_the_time_says_which_attempt_it_was(run: RunDirectory):
    run.log.write_text(f"{started(1, 'local')}one\n{started(3, 'local')}three\n{started(5, 'local')}five\n")
    (run.logs / "rank-1.txt").write_text(f"{started(2, 'rank 1 of 2')}two\n{started(3, 'rank 1 of 2')}same second\n")
    files = logs.log_files(run, "all")
    prefixed = [attempt_of(run, files, number).splitlines()[1::2] for number in ("1", "2", "3")]
    assert prefixed == [
        ["[rank 0] one", "[rank 1] two"],
        ["[rank 0] three", "[rank 1] same second"],
        ["[rank 0] five"],
    ]


def test_without_attempts_a_log_is_whole(run: RunDirectory):
    run.log.write_text("in the launcher's process\n")
    assert attempt_of(run, logs.log_files(run)) == "in the launcher's process\n"
