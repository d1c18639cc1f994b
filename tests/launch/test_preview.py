"""The scripts that a plan shows are those that a run is started with, and no secret is in them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import plan, submit
from fiddlehead.launch.docker import container_name, docker
from fiddlehead.launch.local import local
from fiddlehead.launch.slurm import SlurmExecutor, slurm
from fiddlehead.launch.slurm_script import batch_script
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run import RunDirectory

pytestmark = pytest.mark.usefixtures("nemo_run")

KEY = "not-for-anyone-1234"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", str(tmp_path / "secrets"))


def recipe_in(folder: Path) -> Any:
    recipe = tiny_test()
    recipe.log.dir, recipe.log.name, recipe.data.paths, recipe.model.config.vocab_size = str(folder), "a", None, 300
    return recipe


@pytest.mark.parametrize("runs", ["runs", "my runs"])
@pytest.mark.parametrize("executor", [local(), slurm(partition="gpu", account="me")], ids=["local", "slurm"])
def test_what_is_shown_is_what_is_submitted(
    executor: Any, runs: str, working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (working_directory / "mine.py").write_text("")
    made = plan(recipe_in(working_directory / runs), executor)
    shown = made.scripts()
    assert not (working_directory / runs).exists()
    assert made.executor is not None
    monkeypatch.setattr(type(executor), "check", lambda self, run: None)
    run = submit.write_run(made.recipe, made.executor, name=None, command="")
    assert shown["job.sh"].splitlines() == run.script.read_text().splitlines()
    if isinstance(made.executor, SlurmExecutor):
        assert shown["sbatch.sh"] == batch_script(made.executor, run) and str(run.path) in shown["sbatch.sh"]
    assert set(shown) == ({"sbatch.sh", "job.sh"} if executor.kind == "slurm" else {"job.sh"})
    assert not any(KEY in text for text in shown.values())


def test_a_container_is_shown_as_a_command(working_directory: Path) -> None:
    executor = docker(image="fiddlehead:1", mounts=["/data:/d,ata:ro"], memory="8g")
    shown = plan(recipe_in(working_directory / "my runs"), executor).scripts()
    words = shlex.split(shown["docker"].replace("\\\n", ""))
    run = RunDirectory(working_directory / "my runs" / "a")
    assert words[:2] == ["docker", "run"] and words[-2:] == ["fiddlehead:1", str(run.path / "job.sh")]
    assert f"--name={container_name(run)}" in words and "--memory=8g" in words
    assert f"--mount=type=bind,source={run.path},target={run.path}" in words
    assert '--mount=type=bind,source=/data,"target=/d,ata",readonly' in words
    assert any(word.startswith("--mount") and "secrets/a-" in word for word in words)
    assert not any(KEY in text for text in shown.values())


def test_a_secret_that_someone_typed_into_a_line_is_hidden(working_directory: Path) -> None:
    shown = plan(recipe_in(working_directory / "runs"), local(setup_lines=f"login {KEY}")).scripts()
    assert "login ***" in shown["job.sh"]


def test_a_run_in_this_process_has_no_script(working_directory: Path) -> None:
    with pytest.raises(ConfigError, match="has no script; name an executor"):
        plan(recipe_in(working_directory / "runs")).scripts()
