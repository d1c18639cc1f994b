"""Sweeps: the runs that the values make, and their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import sweep, watch
from fiddlehead.launch.sweep import Sweep, Variant
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status
from tests import warm


def pretrain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fiddlehead.cli import main; main()", "pretrain", "-f", "tiny_test"]
    environment = {**os.environ, **warm.everywhere()}
    return warm.run([*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_a_grid_has_every_combination():
    edits = ["optim.lr=1e-3,3e-4", "seed=1", "model.config.num_query_groups=1,2"]
    variants = sweep.expand(edits, "a")
    assert [variant.edits(edits) for variant in variants] == [
        ["optim.lr=1e-3", "seed=1", "model.config.num_query_groups=1"],
        ["optim.lr=1e-3", "seed=1", "model.config.num_query_groups=2"],
        ["optim.lr=3e-4", "seed=1", "model.config.num_query_groups=1"],
        ["optim.lr=3e-4", "seed=1", "model.config.num_query_groups=2"],
    ]
    assert variants[0].name == "a-lr=1e-3-num_query_groups=1"


def test_zipped_values_go_together():
    variants = sweep.expand(["optim.lr=1,2", "seed=3,4"], "a", zipped=True)
    assert [variant.values for variant in variants] == [
        {"optim.lr": "1", "seed": "3"},
        {"optim.lr": "2", "seed": "4"},
    ]
    with pytest.raises(ConfigError, match=r"--zip: .*optim.lr has 2, seed has 3"):
        sweep.expand(["optim.lr=1,2", "seed=3,4,5"], "a", zipped=True)


@pytest.mark.parametrize("edit", ["optim.betas=(0.9,0.95)", "data.paths=[a,b]", "log.wandb_project='a,b'", "seed=1"])
def test_commas_in_brackets_and_quotes_do_not_separate_values(edit: str):
    edits = [edit, "optim.lr=1,2"]
    variants = sweep.expand(edits, "a")
    assert [variant.edits(edits) for variant in variants] == [[edit, "optim.lr=1"], [edit, "optim.lr=2"]]


def test_a_name_that_is_not_a_sweep_is_refused():
    with pytest.raises(ConfigError, match="no edit has several values"):
        sweep.expand(["optim.lr=1"], "a")
    with pytest.raises(ConfigError, match=r"give them as optim.lr="):
        sweep.expand(["optim.lr*=1,2"], "a")
    with pytest.raises(ConfigError, match="several values already"):
        sweep.expand(["seed=1,2", "seed=3,4"], "a")
    with pytest.raises(ConfigError, match="names its runs and keeps"):
        sweep.expand(["log.name=b,c"], "a")


def test_names_are_folders_and_differ():
    variants = sweep.expand(["data.paths=[a/b c],[a/b:c]", "seed=1,2"], "a")
    names = [variant.name for variant in variants]
    assert len(set(names)) == 4
    assert all(Path(name).name == name and len(name) <= 100 for name in names)
    long = sweep.expand([f"log.wandb_project={'x' * 200},{'y' * 200}"], "a")
    assert [variant.name for variant in long] == ["a-1", "a-2"]


@pytest.fixture
def ended(tmp_path: Path) -> Sweep:
    """A sweep of three runs: two have a loss, and one has failed."""
    variants = [Variant(f"a-seed={seed}", {"seed": str(seed)}) for seed in (1, 2, 3)]
    made = Sweep("a", str(tmp_path), variants)
    made.save()
    for run, loss in zip(made.runs(), ("3.5", "", "2.5"), strict=True):
        run.path.mkdir()
        run.recipe.write_text("")
        state = State.SUCCEEDED if loss else State.FAILED
        run.write_status(Status(state, ended=time.time(), exit_code=int(not loss)))
        run.metrics.write_text(f"step,loss\n1,{loss}\n")
    return made


def test_results_are_sorted_and_those_without_come_last(ended: Sweep):
    assert sweep.metric_of(ended) == "loss"
    rows = sweep.results(sweep.load("a", ended.directory), "loss")
    assert [(variant.values["seed"], value) for variant, _, value in rows] == [("3", 2.5), ("1", 3.5), ("2", None)]
    assert sweep.failed(ended, watch.states(ended.runs())) == ["a-seed=2"]


def test_a_run_that_diverged_is_behind_those_that_did_not(ended: Sweep):
    ended.runs()[2].metrics.write_text("step,loss,val_loss\n1,nan,\n")
    assert [variant.values["seed"] for variant, _, _ in sweep.results(ended, "loss")] == ["1", "3", "2"]


def test_a_metric_that_no_run_has_is_refused_with_the_nearest(ended: Sweep):
    ended.runs()[0].metrics.write_text("step,loss,val_loss\n1,3.0,4.0\n")
    assert sweep.metric_of(ended) == "val_loss"
    assert sweep.metric_of(ended, "loss") == "loss"
    with pytest.raises(ConfigError, match="--metric: unknown metric 'val_los'; did you mean 'val_loss'"):
        sweep.metric_of(ended, "val_los")


def test_two_sweeps_cannot_have_one_name(ended: Sweep):
    ended.save()
    with pytest.raises(ConfigError, match="another sweep"):
        Sweep("a", ended.directory, ended.variants[:2]).save()
    with pytest.raises(ConfigError, match="unknown sweep 'b'"):
        sweep.load("b", ended.directory)


def test_all_mistakes_of_all_runs_come_before_the_first_start(tmp_path: Path):
    result = pretrain("model.config.num_query_groups=1,3,5", "log.name=s", "--sweep", "--yes", cwd=tmp_path)
    assert result.returncode == 2
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()] == [
        "s-num_query_groups=3",
        "s-num_query_groups=5",
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_on_this_machine(tmp_path: Path):
    options = ["log.name=s", "trainer.max_steps=2", "data.val_samples=0", "optim.lr=1e-3,2e-3", "--sweep", "--yes"]
    result = pretrain(*options, "--max-running", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[2/2 ended]" in result.stdout
    table = [line.split() for line in result.stdout.splitlines() if line.endswith(("lr=1e-3", "lr=2e-3"))]
    assert len([row for row in table if "SUCCEEDED" in row]) >= 2
    runs = [RunDirectory(tmp_path / "runs" / f"s-lr={rate}") for rate in ("1e-3", "2e-3")]
    assert [run.last_step() for run in runs] == [2, 2]
    assert json.loads((tmp_path / "runs" / "s.sweep.json").read_text())["name"] == "s"
