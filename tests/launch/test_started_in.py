"""A run goes on with the files that its recipe meant, from whatever folder it is asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fiddlehead.cli.runs import rerun
from fiddlehead.errors import ConfigError
from fiddlehead.launch import launch
from fiddlehead.launch.started_in import refuse_elsewhere
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes.finetune import full
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run.directory import RunDirectory

ABSOLUTE = "/somewhere"


def again(run: RunDirectory) -> None:
    rerun(run.name, detach=False, allow=[], despite=[], trust_executor=False, directory=str(run.path.parent))


def go_to(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    folder.mkdir(exist_ok=True)
    patch.chdir(folder)
    return folder


@pytest.fixture
def launched(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    shutil.copytree(dataset, go_to(tmp_path / "first", monkeypatch) / "tokens")
    edits = ("data.paths=tokens", "data.corpus=None", "data.tokenizer=None", "trainer.max_steps=2", "log.name=r")
    return launch(apply_overrides(tiny_test(), edits))


def test_relative_paths_are_not_taken_from_another_folder(
    launched: RunDirectory,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again(launched)
    shutil.copytree(dataset, go_to(tmp_path / "other", monkeypatch) / "tokens")  # of the same name
    before = launched.environment.read_bytes()
    with pytest.raises(ConfigError) as error:
        again(launched)
    first = tmp_path / "first"
    said = f"data.paths='tokens': is relative to {first}, where 'r' was launched; go there first: cd {first}"
    assert str(error.value) == said and launched.environment.read_bytes() == before
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(tmp_path / "link")
    again(launched)


def test_a_project_may_be_moved_and_the_folder_of_its_paths_is_said(
    launched: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    (tmp_path / "first").rename(moved)
    monkeypatch.chdir(moved)
    run = RunDirectory(moved / "runs" / "r")
    again(run)
    said = f"WARNING: data.paths='tokens' of 'r': {tmp_path / 'first'}, where it was launched, is gone"
    assert f"{said}, so they are taken from {moved}" in capsys.readouterr().out
    environment = json.loads(run.environment.read_text())
    assert environment.pop("launched_in") == str(moved)
    run.environment.write_text(json.dumps(environment))  # as earlier versions wrote it
    again(run)
    assert "where it was launched is not known, so they are taken from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "edits", "relative"),
    [
        (tiny_test, {}, []),
        (tiny_test, {"data.paths": ABSOLUTE, "resume": "never"}, []),
        (tiny_test, {"data.paths": "~/tokens", "resume": "other"}, ["resume"]),
        (tiny_test, {"data.paths": ["0.5", ABSOLUTE, "0.5", f"{ABSOLUTE}/b"]}, []),
        (tiny_test, {"data.paths": [0.5, ABSOLUTE, 0.5, "b"]}, ["data.paths"]),
        (tiny_test, {"data.paths": {"train": [ABSOLUTE], "validation": "b"}}, ["data.paths"]),
        (tiny_test, {"model.init_from": "a_run", "data.paths": ABSOLUTE}, ["model.init_from"]),
        (full, {"model.init_from": Path("."), "data.paths": "x.jsonl"}, ["model.init_from", "data.paths"]),
        (full, {"data.val_paths": (ABSOLUTE, "x"), "data.tokenizer": "t"}, ["data.val_paths", "data.tokenizer"]),
    ],
)
def test_every_path_of_a_recipe_is_looked_at(
    recipe: Any, edits: dict[str, Any], relative: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Recipe = recipe()
    for path, value in edits.items():
        owner, _, name = path.rpartition(".")
        setattr(getattr(made, owner) if owner else made, name, value)
    run = RunDirectory(tmp_path)
    run.environment.write_text(json.dumps({"launched_in": str(tmp_path)}))
    go_to(tmp_path / "other", monkeypatch)
    if not relative:
        refuse_elsewhere(run, made)
        return
    with pytest.raises(ConfigError) as error:
        refuse_elsewhere(run, made)
    assert [problem.path for problem in error.value.problems] == relative
