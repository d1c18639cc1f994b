"""A run is compared with its plan, and says why it is slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fiddlehead import tasks
from fiddlehead.errors import ConfigError
from fiddlehead.plan.cards import CARDS, Card
from fiddlehead.plan.memory import GIB, Memory
from fiddlehead.plan.speed import Speed
from fiddlehead.plan.training import TrainingPlan
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.prediction import Prediction
from fiddlehead.training.callbacks import expected
from fiddlehead.training.callbacks.checkpoint import Checkpoint
from fiddlehead.training.callbacks.expected import slow_because
from fiddlehead.training.callbacks.phases import Phases, Spent
from tests.training.callbacks.test_phases import slow as slow

Pretrain = Callable[..., RunDirectory]

PLANNED = Prediction(
    gpus=1,
    max_steps=100,
    tokens_per_step=64,
    gpu="h100",
    tokens_per_s=640,
    seconds_per_step=0.1,
    seconds_computing=0.09,
    seconds_communication=0.0,
    seconds_optimizer=0.01,
)


def spent(steps: int = 10, pauses: dict[str, float] | None = None, **phases: float) -> Spent:
    """So many steps as planned, with more seconds a step in some phases."""
    step = {"data": 0.0, "forward": 0.03, "backward": 0.06, "optimizer": 0.01, "rest": 0.0}
    return Spent(steps, {name: steps * (each + phases.get(name, 0.0)) for name, each in step.items()}, pauses or {})


@pytest.mark.parametrize(
    ("took", "said"),
    [
        (spent(data=0.1), "waits for data: try more data.num_workers"),
        (spent(data=0.04, forward=0.06), "forward and backward passes"),
        (spent(optimizer=0.1), "in the optimizer's step"),
        (spent(rest=0.1), "between steps"),
        (spent(200, {"checkpoint": 20.0}), "for writing checkpoints: try a larger checkpoint.every_n_steps"),
        (spent(200, {"validation": 20.0, "checkpoint": 1.0}), "for validations"),
    ],
)
def test_a_slow_run_names_what_takes_longest_beyond_its_plan(took: Spent, said: str):
    found = slow_because(PLANNED, took)
    assert said in found and "of its planned speed on h100" in found and "planned are 100 ms" in found


def test_a_run_near_its_plan_says_nothing():
    assert slow_because(PLANNED, spent(data=0.042)) == ""  # 0.704 of the planned speed
    assert slow_because(PLANNED, spent(data=0.044)) != ""  # 0.694
    assert slow_because(PLANNED, spent(10, {"checkpoint": 9.0})) == ""  # by chance in the first steps
    assert slow_because(replace(PLANNED, seconds_per_step=None), spent(data=9.0)) == ""
    assert slow_because(PLANNED, Spent()) == ""


def test_slow_links_are_told_from_slow_products():
    several = replace(PLANNED, gpus=2, seconds_communication=0.0)
    assert "gradients of other ranks" in slow_because(several, spent(backward=0.1), communication=0.1)
    assert "with what the ranks exchange" in slow_because(several, spent(backward=0.1), communication=0.01)
    assert "with what the ranks exchange" in slow_because(several, spent(backward=0.1))


def test_a_throttled_gpu_is_named(monkeypatch: pytest.MonkeyPatch):
    """Simulates what CUDA and nvidia-smi say of the GPU that trains."""
    clocks = {"sm_mhz": 990.0, "max_sm_mhz": 1980.0, "celsius": 88.0}
    monkeypatch.setattr(expected, "describe_gpus", lambda uuid: [clocks] if uuid == "GPU-abc" else [])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    throttled = partial(expected._throttled, torch.device("cuda", 0))
    assert "the GPU is throttled: 990 of 1,980 MHz at 88 °C" in slow_because(
        PLANNED, spent(forward=0.1), None, throttled
    )
    assert "throttled" not in slow_because(PLANNED, spent(data=0.1), None, throttled)
    clocks["sm_mhz"] = 1400.0  # what the power allows
    assert throttled() == ""
    del clocks["sm_mhz"]  # the driver does not say
    assert throttled() == "" and expected._throttled(torch.device("cpu")) == ""


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulates that the plan knows the device that trains, which is the CPU: its card, and how fast it is."""

    def known(card: Card = CARDS["h100"], *, gib: float = 8.0, seconds: float = 1e-3) -> None:
        make = tasks.plan_training

        def made(*args: Any, **kwargs: Any) -> TrainingPlan:
            plan = make(*args, **kwargs)
            memory = Memory(gib * GIB, 0, 0, 0, 0, 0, 0, "the forward pass", 0)
            speed = Speed(seconds, 0, 0, 0, {}, 0, plan.tokens_per_step / seconds, 0.5, 0)
            return replace(plan, card=card, memory=memory, speed=speed)

        monkeypatch.setattr(tasks, "plan_training", made)

    return known


def test_at_its_tenth_step_a_run_says_once_what_was_planned_and_measured(
    on_a_gpu, pretrain: Pretrain, capsys: pytest.CaptureFixture[str]
):
    on_a_gpu(seconds=1e-9)
    run = pretrain(max_steps=24, val_samples=0)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("plan at step")]
    assert line.startswith("plan at step 10: 64,000,000,000 tokens/s planned, ")
    assert "measured (-100.0%); 8.00 GiB planned, " in line
    assert out.count("of its planned speed") == 1
    found = run.prediction()
    assert found is not None and (found.gpu, found.memory_gib, found.needed_gib) == ("h100", 8.0, 8.24)


def test_a_slow_phase_of_a_run_is_found(
    slow: None, on_a_gpu, pretrain: Pretrain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(expected, "WARM_UP", 1)
    monkeypatch.setattr(expected, "COMPARED", 3)
    on_a_gpu(seconds=0.16)  # the forward and backward passes sleep 0.14 s, the optimizer 0.1, and the data 0.04
    pretrain(max_steps=3, val_samples=0)
    out = capsys.readouterr().out
    assert "in the optimizer's step" in out and "waits for data" not in out


def test_a_run_as_fast_as_planned_has_no_warning(on_a_gpu, pretrain: Pretrain, capsys: pytest.CaptureFixture[str]):
    on_a_gpu(seconds=10.0)
    pretrain(max_steps=11, val_samples=0)
    out = capsys.readouterr().out
    assert "plan at step 10" in out and "WARNING" not in out


def test_a_run_of_which_nothing_is_planned_is_not_compared(pretrain: Pretrain, capsys: pytest.CaptureFixture[str]):
    run = pretrain(max_steps=10, val_samples=0)
    assert "plan at step" not in capsys.readouterr().out
    found = run.prediction()
    assert found is not None and not found.knows


def test_pauses_are_told_apart(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch):
    found: list[Phases] = []
    begin, validated = Phases.on_train_start, Checkpoint.on_validation_end

    def slowly(self: Checkpoint, *given: Any) -> None:
        time.sleep(0.1)  # a part of the validation; then it saves
        validated(self, *given)

    monkeypatch.setattr(Phases, "on_train_start", lambda self, *given: (found.append(self), begin(self, *given))[1])
    monkeypatch.setattr(Checkpoint, "on_validation_end", slowly)
    pretrain(max_steps=4, val_check_interval=4)
    so_far = found[0].so_far()
    assert so_far.steps == 4 and so_far.pauses["validation"] >= 0.1 and so_far.pauses["checkpoint"] > 0
    assert so_far.since(so_far) == Spent(0, dict.fromkeys(so_far.phases, 0.0), dict.fromkeys(so_far.pauses, 0.0))


def test_a_job_whose_gpu_is_too_small_is_refused_before_it_trains(
    on_a_gpu, pretrain: Pretrain, capsys: pytest.CaptureFixture[str], tmp_path
):
    on_a_gpu(CARDS["l4"], gib=40.0)
    run = RunDirectory(tmp_path / "runs" / "run")
    run.path.mkdir(parents=True)
    run.write_prediction(replace(PLANNED, gpu="h100"))
    with pytest.raises(ConfigError, match=r"needs 41.2 GiB of a GPU, 19.2 GiB more than l4 has"):
        pretrain(max_steps=1)
    run.write_prediction(replace(PLANNED, gpu="h100", despite=("memory",)))
    pretrain(max_steps=1)
    found = run.prediction()
    assert found is not None and (found.gpu, found.despite) == ("l4", ("memory",))
    assert "more than l4 has" in capsys.readouterr().out
