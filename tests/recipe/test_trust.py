"""Runs that this user launched are trusted; runs from elsewhere are not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fiddlehead.cli import runs as command
from fiddlehead.cli.common import load_recipe
from fiddlehead.errors import ConfigError
from fiddlehead.launch import plan, watch
from fiddlehead.launch.local import local
from fiddlehead.launch.slurm import slurm
from fiddlehead.launch.submit import write_run
from fiddlehead.recipe import Recipe, catalog, trust
from fiddlehead.run.directory import RunDirectory
from tests.conftest import forget_modules

MINE = """
from dataclasses import dataclass
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.training import AdamW
import fiddle as fdl
@dataclass(frozen=True, kw_only=True)
class Mine(AdamW):
    pass
def mine() -> Recipe:
    recipe = tiny_test()
    fdl.update_callable(recipe.optim, Mine)
    return recipe
"""


@pytest.fixture(autouse=True)
def project(working_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A working directory with a recipe and a class of the user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget_modules()
    Path("recipes").mkdir()
    Path("recipes/mine.py").write_text(MINE)
    yield working_directory
    forget_modules()


def launched(name: str = "a", **executor: str) -> RunDirectory:
    recipe = catalog.find_recipe("mine")()
    recipe.log.name = name
    made = plan(recipe, local(**executor) if executor else None)
    made.refuse_problems()
    return write_run(made.recipe, made.executor, name=None, command=None, allow=recipe.names_to_allow())


def test_what_the_user_has_launched_is_read_again_without_a_word() -> None:
    run = launched()
    forget_modules()
    recipe, name = load_recipe("a")
    assert (name, recipe.names_to_allow()) == ("a", ["recipes.mine:Mine"])
    assert not recipe.diff(Recipe.load(run.recipe))
    assert not recipe.diff(load_recipe(f"@{run.recipe}")[0])


@pytest.mark.parametrize("change", ["a copy", "other text", "another project", "another file", "no note"])
def test_a_changed_or_foreign_run_is_not_trusted(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = launched()
    forget_modules()
    file = run.recipe
    if change == "a copy":
        file = Path(shutil.copytree(run.path, "runs/b")) / "recipe.yaml"
    elif change == "other text":
        file.write_text(file.read_text().replace("lr: 0.004", "lr: 0.002"))
    elif change == "another project":  # whose file of that name would be run
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree("recipes", elsewhere / "recipes")
        (elsewhere / "recipes" / "mine.py").write_text("raise RuntimeError('the wrong one')\n")
        monkeypatch.chdir(elsewhere)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(run.path.parents[1])])
    elif change == "another file":
        file = Path(shutil.copy(file, run.path / "other.yaml"))
    else:
        trust.forget(run)
    with pytest.raises(ConfigError, match=r"recipes\.mine:Mine is not trusted: .*--allow recipes\.mine"):
        Recipe.load(file)
    assert "recipes.mine" not in sys.modules


def test_a_folder_cannot_vouch_for_itself() -> None:
    """Whatever notes a stranger puts into a run's folder, nobody reads them there."""
    run = launched()
    notes = list((run.path.parents[1] / "state").rglob("*.json"))
    assert len(notes) == 1 and not notes[0].is_relative_to(run.path)
    assert notes[0].stat().st_mode & 0o077 == 0
    notes[0].rename(run.path / "launched.json")
    with pytest.raises(ConfigError, match="not trusted"):
        Recipe.load(run.recipe)


@pytest.mark.parametrize("home", ["missing", "broken"])
def test_without_a_place_for_notes_a_launch_goes_on_and_the_run_asks(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "state") if home == "missing" else str(tmp_path))
    run = launched()
    if home == "broken":
        next(tmp_path.glob("fiddlehead/launched/*.json")).write_text("[1]")
    with pytest.raises(ConfigError, match="not trusted"):
        Recipe.load(run.recipe)


def test_a_changed_executor_file_is_not_trusted() -> None:
    """Its `executor.json` has lines for a shell: those of a stranger's would be run."""
    run = launched(setup_lines="true")
    assert trust.knows_executor(run)
    run.executor.write_text(run.executor.read_text().replace("true", "touch /tmp/ran"))
    assert not trust.knows_executor(run)
    with pytest.raises(ConfigError, match="you did not launch this run from here"):
        command.rerun(str(run.path), detach=False, allow=[], trust_executor=False, directory="runs")


@pytest.mark.parametrize("setting", [{"setup_lines": "x"}, {"python": "x"}, {"env_vars": {"LD_PRELOAD": "x"}}, {}])
def test_a_run_that_only_this_machine_had_has_no_commands(setting: dict[str, Any], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert watch.is_plain(run), "it ran in its launcher"
    local(2, **setting).save(run)
    assert watch.is_plain(run) == (not setting)
    slurm().save(run)
    assert not watch.is_plain(run)


def test_a_folder_that_is_not_a_run_is_not_made_one(tmp_path: Path) -> None:
    """A recipe says where it is written: what lies there already would be overwritten, or `code` deleted."""
    work = tmp_path / "runs" / "work"
    work.mkdir(parents=True)
    (work / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match=r"log\.name='work': .*/runs/work exists and is not a run"):
        launched("work")
    assert [file.name for file in work.iterdir() if file.name != ".lock"] == ["thesis.txt"]
    (tmp_path / "runs" / "empty").mkdir()
    assert launched("empty").recipe.exists()
