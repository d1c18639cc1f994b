"""Damaged files of a run are named, with what to do, and the rest of the run is still shown."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import watch
from fiddlehead.recipe.plain import plain_recipe
from fiddlehead.run import damage, directory
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, this_process


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A whole run."""
    found = RunDirectory(tmp_path / "runs" / "demo")
    found.path.mkdir(parents=True)
    found.write_status(replace(this_process(1, "local"), state=State.SUCCEEDED))
    found.recipe.write_text("{}\n")
    found.metrics.write_text("step,loss\n1,3.0\n2,2.0\n")
    found.environment.write_text("{}")
    found.executor.write_text('{"kind": "local"}')
    return found


def test_a_whole_run_is_not_damaged(run: RunDirectory) -> None:
    assert damage.find(run) == [] == damage.find(RunDirectory(run.path / "none"))


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "3", "null", '"RUNNING"', "\udcff", "[" * 100_000, "{}", '{"state": "GONE"}', '{"state": ["x"]}',
        '{"state": "DAMAGED"}', '{"state": "FAILED", "started": "noon"}', '{"state": "FAILED", "started": 1e999}',
        '{"state": "FAILED", "started": NaN}', '{"state": "RUNNING", "pid": "one"}', '{"state": "RUNNING", "host": 3}',
        '{"state": "FAILED", "attempt": true}', '{"state": "FAILED", "attempt": null}',
    ],
)  # fmt: skip
def test_a_spoiled_status_is_said_and_the_others_are_as_ever(run: RunDirectory, content: str) -> None:
    whole = RunDirectory(run.path.with_name("whole"))
    whole.path.mkdir()
    whole.write_status(replace(this_process(1, "local"), state=State.FAILED))
    (run.path / "status").write_bytes(content.encode(errors="surrogateescape"))
    (problem,) = damage.find(run)
    assert f"{run.path}/status: is damaged: " in problem and "goes on from its newest checkpoint" in problem
    before, after = watch.states([run, whole])
    assert before and after and (before.state, after.state) == (State.DAMAGED, State.FAILED)
    assert before.reason == problem and before.state.ended


def test_a_status_of_another_version_is_read_as_far_as_it_is_known(run: RunDirectory) -> None:
    values = asdict(Status(State.FAILED, ended=None, exit_code=None)) | {"of_a_newer_version": {}}
    del values["machine"]
    (run.path / "status").write_text(json.dumps(values))
    assert run.written_status() == Status(State.FAILED)


NAMES = (
    *("recipe.yaml", "metrics.csv", "executor.json", "environment.json", "command", "job_id", "stop", "wandb_id"),
    *("resumed_from", "attention.json", "status"),
)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_not_utf_8_are_damage_in_every_file(run: RunDirectory, name: str) -> None:
    (run.path / name).write_bytes(b"step,loss\n1,\xff\n")
    (problem,) = damage.find(run)
    assert problem.startswith(f"{run.path / name}: is damaged: ") and "; " in problem
    # And what only looks does not fail.
    watch.states([run])
    assert (run.last_metrics().get("loss"), run.last_step()) == ((None, 1) if name == "metrics.csv" else ("2.0", 2))
    assert isinstance(run.job_id, str) and isinstance(run.wandb_id, str)
    run.stop_request()


@pytest.mark.parametrize(
    "row", ["oops", "3,oops", "3,\0", "\u00b2,1.0", "3,1.0,2.0,3.0", "x" * 200_000, "3,1_", "three,1.0"]
)
def test_a_word_among_the_metrics_is_left_out_and_said(run: RunDirectory, row: str) -> None:
    with run.metrics.open("a") as file:
        file.write(row + "\n")
    assert all(float(value) for value in run.last_metrics().values()) and run.last_step() in (2, 3)
    numbers = row == "3,1.0,2.0,3.0"
    assert bool(damage.find(run)) is not numbers
    if not numbers:
        assert "is not a number; repair it, or move it away" in damage.find(run)[0]


def test_only_what_a_run_goes_on_from_is_in_its_way(run: RunDirectory) -> None:
    for name in NAMES:
        (run.path / name).write_bytes(b"\xff")
    assert len(damage.find(run)) == len(NAMES)
    named = {Path(problem.split(": is damaged")[0]).name for problem in damage.in_the_way(run)}
    assert named == {"status", "recipe.yaml", "metrics.csv", "wandb_id", "resumed_from"}


# -- a full disk


def test_on_a_full_disk_a_status_takes_the_place_of_the_one_before(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = replace(this_process(1, "direct"), reason="é" * 100)
    run.write_status(running)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory, "write_atomically", full)
    run.write_status(replace(running, state=State.FAILED, reason="No space left"))
    assert run.written_status() == replace(running, state=State.FAILED, reason="No space left")
    room = 512 * (run.path / "status").stat().st_blocks
    run.write_status(replace(running, state=State.FAILED, reason="é" * room))
    status = run.written_status()
    assert status and status.state is State.FAILED and set(status.reason) == {"?"}
    assert (run.path / "status").stat().st_size <= room, "what was there takes no more of the disk"


def test_a_status_that_was_never_there_cannot_take_its_place(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.path / "status").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_status(this_process(1, "direct"))


def test_a_file_that_is_not_a_recipe_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b"\xff", b"{", b"- 1", b"[" * 5000):
        (tmp_path / "recipe.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"recipe\.yaml (cannot be read|is not a recipe)"):
            plain_recipe(tmp_path / "recipe.yaml")
