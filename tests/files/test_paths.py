"""Paths as users write them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fiddlehead
from fiddlehead import environment
from fiddlehead.checkpoints.weights import find_weights
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.files.paths import user_path, working_directory
from fiddlehead.launch import plan, secrets
from fiddlehead.launch.sweep import load
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run.names import find_run, list_runs, reserve_name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home; the working directory is another folder."""
    home = tmp_path / "home"
    (home / "runs" / "a").mkdir(parents=True)
    (home / "work").mkdir()
    (home / "runs" / "a" / "recipe.yaml").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    return home


def test_a_tilde_is_the_home_wherever_a_path_is_written(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert user_path("~/x") == home / "x" and user_path("x~") == Path("x~")
    assert [run.path for run in list_runs("~/runs")] == [find_run("a", "~/runs").path] == [find_run("~/runs/a").path]
    assert (home / "runs" / reserve_name("r", "~/runs")).is_dir()
    recipe = tiny_test()
    recipe.save("~/r.yaml")
    assert Recipe.load("~/r.yaml") == recipe
    (home / "lr.yaml").write_text("0.5")
    assert apply_overrides(recipe, ["optim.lr=@~/lr.yaml"]).optim.lr == 0.5
    assert FineTuningDataModule(["~/a.jsonl"], seq_length=8, global_batch_size=4).paths == [home / "a.jsonl"]
    assert PreTrainingDataModule(paths="~/t", tokenizer=None, seq_length=8, global_batch_size=4).paths == home / "t"
    (home / "m").mkdir()
    (home / "m" / "config.json").touch()
    assert find_weights("~/m") == home / "m"
    with pytest.raises(ConfigError, match=r"unknown sweep 's'"):
        load("s", "~/runs")
    monkeypatch.setenv("FIDDLEHEAD_CACHE", "~/cache")
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", "~/secrets")
    assert (environment.cache_folder(), secrets.folder()) == (home / "cache", home / "secrets")
    assert not Path("~").exists()


def test_there_is_one_place_that_knows_what_a_tilde_is():
    package = Path(fiddlehead.__file__).parent
    folders = (package, package / "launch", package / "recipes")  # in a checkout, the latter are links
    files = {file.resolve() for folder in folders for file in folder.rglob("*.py")}
    texts = {file.name: text for file in files if "expanduser" in (text := file.read_text())}
    callers = [
        name
        for name, text in texts.items()
        if any(isinstance(node, ast.Attribute) and node.attr == "expanduser" for node in ast.walk(ast.parse(text)))
    ]
    assert callers == ["paths.py"] and len(files) > 100


@pytest.mark.parametrize("written", ["~nobody-of-this-name/x", "a\0b"])
def test_an_impossible_path_is_refused(written: str):
    with pytest.raises(ConfigError, match="^" + re.escape(repr(written))):
        user_path(written)


def test_a_working_directory_that_was_deleted_is_said(home: Path):
    (home / "work").rmdir()
    with pytest.raises(ConfigError, match="the working directory was deleted"):
        working_directory()
    with pytest.raises(ConfigError, match="the working directory was deleted"):
        plan(tiny_test()).refuse_problems()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("log.name=" + "a" * 250, "log.name=.* has 250 bytes; a name has at most 200"),
        ("log.name=" + "\u00e9" * 101, "log.name=.* has 202 bytes"),
        ("log.name=a\nb", r"log.name='a\\nb': must be printable"),
        ("log.name=-f", "log.name='-f': must be printable characters on one line, and not begin with -"),
        ("log.name=~", "log.name='~': must be"),
        ("log.dir=" + "a" * 300, "log.dir=.*File name too long"),
        ("log.dir=~nobody-of-this-name", "'~nobody-of-this-name': this machine knows no such home"),
        ("log.dir=/dev/null/runs", "log.dir='/dev/null/runs': /dev/null cannot be written"),
        ("log.dir=/dev/null", "log.dir='/dev/null': /dev/null cannot be written"),
        ("resume=nosuch", "resume='nosuch': unknown run 'nosuch'"),
        ("resume=~/step-00000001", "resume='~/step-00000001': there is no such checkpoint"),
    ],
    ids=lambda value: value[:20],
)
def test_impossible_folders_and_names_are_errors_before_anything_starts(home: Path, edit: str, said: str):
    with pytest.raises(ConfigError, match="^" + said):
        plan(apply_overrides(tiny_test(), [edit])).refuse_problems()
