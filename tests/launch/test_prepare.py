"""Before a run starts: the recipe and the executor fit, and what does not leaves no trace."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from fiddlehead.cli.common import configure_executor
from fiddlehead.errors import ConfigError
from fiddlehead.launch import fit_to_executor, launch, rehearse
from fiddlehead.launch.docker import docker
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.local import local
from fiddlehead.launch.slurm import slurm
from fiddlehead.launch.watch import load_executor
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.runs import RunDirectory


def test_the_trainer_follows_the_executor():
    recipe = fit_to_executor(tiny_test(), slurm(nodes=2, gpus_per_node=4))
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (2, 4)
    recipe = tiny_test()
    recipe.trainer.devices = 3
    assert fit_to_executor(recipe, slurm()).trainer.devices == 3
    assert fit_to_executor(recipe, local()).trainer.devices == 3


def test_a_contradiction_is_an_error():
    recipe = tiny_test()
    recipe.trainer.devices, recipe.trainer.num_nodes = 2, 3
    with pytest.raises(ConfigError) as error:
        fit_to_executor(recipe, slurm(nodes=2, gpus_per_node=4))
    assert len(error.value.problems) == 2
    assert "gives 4 on each node" in str(error.value) and "executor.nodes=2" in str(error.value)


def test_gpus_are_asked_for_as_the_recipe_needs_them():
    assert slurm().fitted(8, "gpu").gpus_per_node == 8  # type: ignore[attr-defined]
    assert slurm().fitted(8, "cpu").gpus_per_node is None  # type: ignore[attr-defined]
    assert docker("image").fitted(2, "gpu").gpus == 2  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what it imports
def test_nemo_runs_own_executor_is_refused_by_name():
    import nemo_run

    with pytest.raises(ConfigError, match=r"nemo_run\S*LocalExecutor; give what fiddlehead"):
        launch(tiny_test(), nemo_run.LocalExecutor())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "executor",
    [
        local(2, env_vars={"A": "b c"}),
        slurm("account", nodes=3, secrets=["TOKEN_OF_MINE"], additional_parameters={"reservation": "r"}),
        docker("image", mounts=["/data:/data:ro"]),
    ],
)
def test_settings_are_read_back(executor: Executor, tmp_path: Path):
    run = RunDirectory(tmp_path)
    executor.save(run)
    assert run.executor.stat().st_mode & 0o777 == 0o600
    loaded = load_executor(run)
    assert loaded is not None and json.dumps(vars(loaded)) == json.dumps(vars(executor))


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (["executor=slrum"], "unknown executor 'slrum'; did you mean 'slurm'"),
        (["executor=slurm", "executor.nods=2"], "did you mean 'nodes'"),
        (["executor=slurm", "executor.nodes=0"], "executor.nodes=0: must be 1 or more"),
        (["executor=slurm", "executor.time=tomorrow"], "executor.time='tomorrow'"),
        (["executor=slurm", "executor.env_vars.HF_TOKEN=x"], "looks like a secret"),
        (["executor=docker"], "executor.image: docker needs it"),
        (["executor=docker", "executor.image=x", "executor.nodes=2"], "executor.nodes=2"),
        (["executor=local", "executor.nodes=2"], "executor.nodes=2"),
        (["executor=slurm", "executor=local"], "give only one"),
    ],
)
def test_wrong_settings_are_said(edits: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        configure_executor(edits)
    assert said in str(error.value)


def test_settings_that_depend_on_each_other_are_checked_together():
    executor, _ = configure_executor(["executor=slurm", "executor.time=00:01:00", "executor.save_before=5"])
    assert (executor.time, executor.save_before) == ("00:01:00", 5)  # type: ignore[attr-defined]


def test_a_cluster_of_ones_own(working_directory: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "launch"]:
        monkeypatch.delitem(sys.modules, name)
    (working_directory / "launch").mkdir()
    (working_directory / "launch" / "__init__.py").touch()  # the checkout that is tested has such a folder too
    (working_directory / "launch" / "mine.py").write_text(
        "from fiddlehead.launch.slurm import slurm\n\n\n"
        "def mycluster():\n    return slurm('a', partition='p', time='02:00:00')\n"
    )
    for prefix in ("executor", "run.executor"):
        executor, name = configure_executor([f"{prefix}=mycluster", f"{prefix}.nodes=4"])
        assert name == "mycluster" and executor.nodes == 4 and executor.account == "a"  # type: ignore[attr-defined]


def test_what_is_refused_leaves_no_directory(working_directory: Path, monkeypatch: pytest.MonkeyPatch):
    programs = working_directory / "bin"
    programs.mkdir()
    for name in ("bash", "git", "env"):
        (programs / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(programs))
    recipe = tiny_test()
    recipe.log.name = "a"
    with pytest.raises(ConfigError, match="there is no sbatch"):
        launch(recipe, slurm())
    with pytest.raises(ConfigError, match=r"executor.secrets: .*NOT_THERE"):
        launch(recipe, slurm(secrets=["NOT_THERE"]))
    with pytest.raises(ConfigError, match="there is no sbatch"):
        rehearse(recipe, slurm())
    assert not list((working_directory / "runs").glob("*"))
