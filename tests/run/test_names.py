"""Names of runs."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.run import names
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run, list_runs, reserve_name


def make(directory: Path, name: str, age: int = 0) -> RunDirectory:
    run = RunDirectory(directory / name)
    run.path.mkdir(parents=True)
    run.recipe.touch()
    os.utime(run.recipe, (1e9 - age, 1e9 - age))
    return run


def test_a_run_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "runs", "gpt2-long")
    monkeypatch.chdir(tmp_path)
    assert find_run("gpt2-long") == find_run("runs/gpt2-long") == find_run(str(run.path), "other") == run
    monkeypatch.chdir(run.path)
    assert find_run(".") == run and find_run(".").name == "gpt2-long"


def test_of_many_runs_an_error_names_the_newest(working_directory: Path) -> None:
    for age in range(40):
        make(working_directory / "runs", f"run{age:02}", age)
    with pytest.raises(
        ConfigError, match=r"unknown run 'qqqq' in runs/; allowed: run00, run01, .*, run11, and 28 older ones$"
    ):
        find_run("qqqq")
    with pytest.raises(ConfigError, match=r"did you mean 'run39'\?$"):
        find_run("run39x")


def test_a_name_that_no_run_has_is_refused_with_the_nearest(working_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown run 'x' in runs/; allowed: none"):
        find_run("x")
    make(working_directory / "runs", "gpt2-long")
    (working_directory / "runs" / "gpt2-lang").mkdir()  # no run: it has no recipe
    with pytest.raises(ConfigError, match=r"unknown run 'gpt2-lang' in runs/; did you mean 'gpt2-long'\?"):
        find_run("gpt2-lang")


def test_runs_are_listed_from_the_oldest(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    made = [make(tmp_path, name, age) for name, age in (("b", 30), ("c", 20), ("a", 10))]
    assert list_runs(tmp_path) == made


def test_a_new_name_is_no_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=lambda: datetime(2025, 1, 2, 3, 4, 5))
    monkeypatch.setattr(names, "datetime", clock)
    made = [reserve_name("tiny", tmp_path) for _ in range(4)]
    assert all((tmp_path / name).is_dir() for name in made)
    first = "tiny-20250102-030405"
    assert made == [first, f"{first}-2", f"{first}-3", f"{first}-4"]
