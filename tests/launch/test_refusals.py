"""A run that will not fit, or not get on, is refused before it queues; by name it is started all the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.cli import main
from fiddlehead.errors import ConfigError
from fiddlehead.launch import launch, plan
from fiddlehead.launch.docker import docker
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.local import local
from fiddlehead.launch.shell import Answer, Shell
from fiddlehead.launch.slurm import slurm
from fiddlehead.launch.sweep import Sweep, Variant, run_all
from fiddlehead.numbers import few_digits
from fiddlehead.plan import training
from fiddlehead.plan.cards import CARDS
from fiddlehead.plan.memory import Memory
from fiddlehead.plan.refusals import DISK_BYTES_PER_S
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes.llama import llama2_13b, llama32_1b
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run import damage


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """Simulates what `sinfo` says: the GPUs of the cluster's only partition."""

    def with_gpus(*gres: str) -> None:
        lines = "".join(f"batch*|infinite|4|{each}|up|idle\n" for each in gres)
        monkeypatch.setattr(
            Shell, "ask", lambda *_, **__: Answer(0, lines, "") if gres else Answer(127, "", "no sinfo")
        )

    return with_gpus


def one_gpu(recipe: Recipe, *edits: str) -> Recipe:
    return apply_overrides(recipe, ["trainer.devices=1", "trainer.num_nodes=1", *edits])


@pytest.mark.parametrize(
    ("executor", "offered", "gpu"),
    [
        (slurm(gres="gpu:h100:1"), (), "h100"),
        (slurm(gres="gpu:a100:1"), ("gpu:h200:8",), "a100"),  # it asks for these
        (slurm(), ("gpu:nvidia_h100_80gb_hbm3:8(S:0-1)",), "h100"),
        (slurm(), ("gpu:a100_40:8", "gpu:h100:8"), "h100"),  # the largest of those that it may get
        (slurm(gpus_per_node=1), ("gpu:l4:1,shard:4",), "l4"),
        (slurm(), ("gpu:h100:8", "gpu:8"), None),
        (slurm(), ("gpu:h100:8", "gpu:titan:8"), None),
        (slurm(gres="gpu:1"), ("gpu:8",), None),
        (slurm(), (), None),
        (docker("image"), (), None),
        (local(ntasks_per_node=1), (), None),  # this machine has none
    ],
    ids=str,
)
def test_a_run_that_does_not_fit_is_refused_where_the_gpu_is_known(cluster, executor: Executor, offered, gpu: str):
    cluster(*offered)
    planned = plan(one_gpu(llama2_13b()), executor)
    if gpu is None:
        assert (planned.training.card, planned.refusals) == (None, {})
        assert any("not known here" in value for _, value in planned.rows())
        return
    card = planned.training.card
    assert card is not None and card.name == gpu and list(planned.refusals) == ["memory"]
    memory = planned.training.memory
    assert memory is not None
    needed = (1.03 * memory.peak + memory.outside) / 2**30
    said = str(planned.refusals["memory"])
    assert f"needs {needed:.1f} GiB of a GPU, {needed - card.gib:.1f} GiB more than {gpu} has" in said
    first, *remedies, last = said.splitlines()
    assert "--despite memory" in last and "despite=['memory']" in last
    assert ("", f"would be refused: {first}") in planned.rows()
    assert remedies[0] == ("what makes it fit:" if planned.training.remedies else remedies[-1])
    assert remedies[1:] == [f"  {each.row()}" for each in planned.training.remedies[:3]]


def test_the_kernels_on_a_cluster_stay_unknown(cluster):
    cluster("gpu:h100:8")
    assert plan(one_gpu(llama32_1b()), slurm()).training.attention == ()


def test_a_gpu_that_the_user_names_decides():
    named = plan(one_gpu(llama2_13b()), docker("image"), target="h100")
    assert list(named.refusals) == ["memory"]
    assert plan(one_gpu(llama32_1b()), docker("image"), target="h100").refusals == {}


def test_nothing_of_a_refused_run_is_written(working_directory: Path, cluster):
    cluster()
    planned = plan(one_gpu(llama2_13b()), slurm(gres="gpu:h100:1"))
    with pytest.raises(ConfigError, match="does not fit: it needs"):
        planned.refuse_unfit()
    with pytest.raises(ConfigError, match=r"^despite='memroy': unknown refusal 'memroy'; did you mean 'memory'\?$"):
        planned.refuse_unfit(["memroy"])
    planned.refuse_unfit(["memory"])
    with pytest.raises(ConfigError, match="does not fit"):
        run_all(Sweep("s", "runs", [Variant("s-1", {})]), [planned], slurm())
    assert not (working_directory / "runs").exists()


@pytest.mark.parametrize(("seconds", "refused"), [(-1, True), (1, False)])
def test_a_time_limit_must_leave_room_for_a_step_and_a_checkpoint(seconds: int, refused: bool):
    recipe = one_gpu(llama32_1b(), "data.micro_batch_size=1")
    made = plan(recipe, slurm(gres="gpu:h100:1")).training
    assert made.speed is not None
    # In bf16-mixed a checkpoint has the weights and Adam's two moments in float32.
    least = made.speed.step + 12 * made.parameters / DISK_BYTES_PER_S
    limit = int(least + seconds)
    executor = slurm(
        gres="gpu:h100:1", time=f"0-0:0:{limit}" if limit < 60 else f"{limit // 60}:{limit % 60}", save_before=1
    )
    found = plan(recipe, executor).refusals
    assert list(found) == (["time"] if refused else [])
    if refused:
        assert found["time"].path == "executor.time" and "--despite time" in str(found["time"])
        assert f"{12 * made.parameters / 1e9:,.1f} GB at 1 GB/s a node" in str(found["time"])


def test_nothing_is_refused_on_a_cpu_or_without_a_limit():
    assert plan(tiny_test(), local(ntasks_per_node=1)).refusals == {}
    assert plan(tiny_test(), slurm(ntasks_per_node=1, time="0:30", save_before=1)).refusals == {}
    assert plan(one_gpu(llama32_1b(), "data.micro_batch_size=1"), slurm(gres="gpu:h100:1", time="0")).refusals == {}


def test_a_run_leaves_what_its_plan_predicts(working_directory: Path):
    recipe = apply_overrides(tiny_test(), ["trainer.max_steps=1"])
    run = launch(recipe, name="a", despite=["time"])
    found = run.prediction()
    assert found is not None and found.despite == ("time",) and found.max_steps == 1
    assert (found.gpu, found.memory_gib, found.hours_left(0)) == ("", None, None)  # of a CPU nothing is predicted
    assert damage.find(run) == []
    run.plan.write_text('{"gpus": "many", "max_steps": 1, "tokens_per_step": 1}')
    assert run.prediction() is None
    assert damage.find(run) == [f"{run.plan}: is damaged: gpus='many': must be int; the next attempt replaces it"]
    run.plan.unlink()
    assert run.prediction() is None and damage.find(run) == []


def test_the_gpu_here_is_looked_at_too(working_directory: Path, monkeypatch: pytest.MonkeyPatch):
    """Simulates that this machine's device, a CPU, is a GPU of which the plan needs too much."""
    make = training.plan_training
    memory = Memory(40 * 2**30, 0, 0, 0, 0, 0, 0, "the forward pass", 0)
    monkeypatch.setattr(
        training, "plan_training", lambda *a, **k: replace(make(*a, **k), card=CARDS["l4"], memory=memory)
    )
    recipe = apply_overrides(tiny_test(), ["trainer.max_steps=1"])
    for executor in (None, local(ntasks_per_node=1)):
        with pytest.raises(ConfigError, match=r"needs 41\.2 GiB of a GPU, 19\.2 GiB more than l4 has \(22\.0 GiB\)"):
            recipe.launch(executor)
    assert not (working_directory / "runs").exists()
    run = recipe.launch(name="a", despite=["memory"])
    found = run.prediction()
    assert found is not None and found.despite == ("memory",)
    assert plan(recipe).to_dict()["refusals"].keys() == {"memory"}


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["fiddlehead", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


def test_a_dryrun_says_that_the_launch_would_be_refused(
    cluster, working_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cluster("gpu:h100:8")
    monkeypatch.setattr("fiddlehead.launch.submit.rehearse", lambda *_: "")  # there is no cluster
    words = ["pretrain", "-f", "llama2_13b", "trainer.devices=1", "trainer.num_nodes=1", "executor=slurm", "--dryrun"]
    code, out, err = typed(monkeypatch, capsys, *words)
    assert code == 2 and "would be refused" in out and err.startswith("error: the plan does not fit")
    assert typed(monkeypatch, capsys, *words, "--despite", "memory")[0] == 0
    code, out, _ = typed(monkeypatch, capsys, "pretrain", "tiny_test", "executor=local", "--dryrun", "--script")
    table, job = out.split("\n=== ")
    assert code == 0 and "tiny_test" in table and job.startswith("job.sh\n#!/bin/bash\n")
    assert typed(monkeypatch, capsys, *words[:-1], "--script")[2] == "error: --script goes with --dryrun, of one run\n"
    code, _, err = typed(
        monkeypatch, capsys, *words, "--despite", "memory", "executor.time=0:01", "executor.save_before=0"
    )
    assert code == 2 and err.startswith("error: executor.time: of 1 s is too short")
    code, _, err = typed(monkeypatch, capsys, *words[:-1])  # the launch itself
    assert code == 2 and "there is no data" in err and "error: the plan does not fit" in err
    assert not (working_directory / "runs").exists()
    cluster()  # it does not say which GPUs it has
    assert typed(monkeypatch, capsys, *words)[0] == 0
    code, _, err = typed(monkeypatch, capsys, *words, "--gpu", "a100")
    assert code == 2 and "more than a100 has" in err
    code, _, err = typed(monkeypatch, capsys, *words[:5], "--gpu", "a100")
    assert code == 2 and "the run trains on the GPUs of this machine" in err
    code, out, err = typed(monkeypatch, capsys, *words, "optim.lr=1e-3,2e-3", "--sweep")
    assert code == 0 and "on H100s at 40 % MFU, as the speed is not known" in out
    cluster("gpu:h100:8")
    code, out, err = typed(monkeypatch, capsys, *words, "optim.lr=1e-3,2e-3", "--sweep")
    assert code == 2 and err.count("does not fit") == 2
    hours = plan(one_gpu(llama2_13b()), slurm()).training.gpu_hours
    assert hours is not None and f"{few_digits(2 * hours)} by the plans, on h100" in out and "MFU" not in out
