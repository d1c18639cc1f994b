"""A run that was interrupted and resumed equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from fiddlehead import tasks
from fiddlehead.checkpoints.folder import DamagedCheckpointError
from fiddlehead.data import ByteTokenizer
from fiddlehead.data.tokenize import tokenize
from fiddlehead.errors import ConfigError, StopRequested
from fiddlehead.models import RopeScaling
from fiddlehead.plan.resume import resume_point
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.signals import SIGNALS
from fiddlehead.run.status import State, Status, StopRequest
from fiddlehead.training import AdamW, Muon, WarmupStableDecay
from fiddlehead.training.optim import Optim
from tests.training.conftest import KillAfter, Killed, Parts, parameters, rows

Pretrain = Callable[..., RunDirectory]
EXACT = ("step", "loss", "val_loss", "val_nats_per_byte", "lr", "grad_norm", "tokens")
"""The columns that do not depend on the clock."""


def assert_same(found: RunDirectory, expected: RunDirectory, step: int = 12) -> None:
    assert rows(found, *EXACT) == rows(expected, *EXACT)
    assert_same_parameters(parameters(found, step), parameters(expected, step))


def assert_same_parameters(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden_dropout": 0.2, "attention_dropout": 0.1},
        {"micro_batch_size": 2, "global_batch_size": 6, "hidden_dropout": 0.2},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 3, "lr_scheduler": WarmupStableDecay(warmup_steps=5, decay_fraction=0.5)},
        {"val_samples": 0},
        {"optim": Muon},
        {
            "separate_documents": True,
            "seq_length": 48,
            "micro_batch_size": 2,
            "window_size": (7, 0),
            "window_attn_skip_freq": (1, 0),
            "rope_scaling": RopeScaling(),
        },
    ],
    ids=[
        "plain",
        "dropout",
        "accumulation",
        "bf16",
        "validation-elsewhere",
        "no-validation",
        "muon",
        "documents-and-windows",
    ],
)
@pytest.mark.parametrize("killed_after", [6, 8])
def test_a_killed_run_goes_on_exactly(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str], killed_after: int, settings: dict[str, Any]
) -> None:
    """Steps 4 and 8 are saved; what was logged after the last of them is trained and logged again."""
    whole = pretrain(name="whole", **settings)
    with pytest.raises(Killed):
        pretrain(callbacks=[KillAfter(killed_after)], **settings)
    before = torch.get_rng_state()
    torch.manual_seed(99)  # the new process need not draw what the old one did
    capsys.readouterr()
    resumed = pretrain(**settings)
    torch.set_rng_state(before)
    assert f"continues from {resumed.checkpoints}/step-" in capsys.readouterr().out
    assert_same(resumed, whole)


class Signal(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("step", [7, 11], ids=["odd", "before-the-last"])
def test_a_stopped_run_saves_its_step_and_goes_on_exactly(
    pretrain: Pretrain, step: int, signum: signal.Signals
) -> None:
    whole = pretrain(name="whole")
    handlers = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(StopRequested, match=f"after step {step}, which is saved: {signum.name}") as stop:
        pretrain(callbacks=[Signal(step, signum)])
    assert stop.value.exit_code == 130
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    assert_same(pretrain(), whole)


@pytest.mark.parametrize("slurm", [False, True], ids=["elsewhere", "under-slurm"])
def test_a_stop_is_asked_for_again_later_where_jobs_are_requeued(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, slurm: bool
) -> None:
    monkeypatch.setenv("FIDDLEHEAD_REQUEUES", "3")
    if slurm:  # where Lightning would save a checkpoint of its own, and requeue by itself
        for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
            monkeypatch.setenv(name, "1" if name == "SLURM_NTASKS" else "0")
        monkeypatch.setattr(subprocess, "call", lambda command: pytest.fail(f"Lightning ran {command}"))
    for step, signum, exit_code in ((3, signal.SIGUSR1, 75), (5, signal.SIGTERM, 75), (8, signal.SIGINT, 130)):
        with pytest.raises(StopRequested, match=f"after step {step}, which is saved") as stop:
            pretrain(callbacks=[Signal(step, signum)])
        assert stop.value.exit_code == exit_code
    pretrain()


def test_a_stop_file_is_a_stop(pretrain: Pretrain, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "run")
    run.path.mkdir(parents=True)
    run.request_stop(StopRequest("cancelled by me"))
    with pytest.raises(StopRequested, match="stopped before the first step: cancelled by me"):
        pretrain()
    assert run.stop_request() is None and not run.checkpoints.joinpath("step-00000000").exists()
    assert pretrain().last_step() == 12


def test_a_stop_does_not_wait_for_a_validation(pretrain: Pretrain) -> None:
    """Who stops a run may not wait that long before killing it; the resumed run makes up for it."""
    whole = pretrain(name="whole")
    with pytest.raises(StopRequested, match="after step 8, which is saved"):
        pretrain(callbacks=[Signal(8, signal.SIGTERM)])
    stopped = pretrain()
    assert rows(stopped, *EXACT) == rows(whole, *EXACT)
    assert_same_parameters(parameters(stopped, 12), parameters(whole, 12))


def test_a_run_that_is_interrupted_twice_goes_on_exactly(pretrain: Pretrain) -> None:
    whole = pretrain(name="whole")
    for killed_after in (5, 10):
        with pytest.raises(Killed):
            pretrain(callbacks=[KillAfter(killed_after)])
    assert_same(pretrain(), whole)


def test_a_run_that_is_done_is_left_alone(pretrain: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(max_steps=4)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()}
    pretrain(max_steps=4)
    assert "has reached step 4 of 4: nothing is left to train" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()}


def test_another_run_s_checkpoint_is_a_start(pretrain: Pretrain) -> None:
    whole = pretrain()
    by_path = pretrain(name="by-path", resume=str(whole.checkpoints / "step-00000004"))
    assert_same_parameters(parameters(by_path, 12), parameters(whole, 12))
    whole.recipe.touch()  # which makes it a run that can be named
    by_name = pretrain(name="by-name", resume="run", max_steps=13)
    assert rows(by_name, "step")[0] == ("13",)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (AdamW(lr=1e-2), AdamW(lr=2e-3, betas=(0.5, 0.6), eps=1e-5, weight_decay=0.3)),
        (Muon(lr=1e-2), Muon(lr=2e-3, momentum=0.5, adamw_lr=3e-3, weight_decay=0.3)),
    ],
    ids=["adamw", "muon"],
)
def test_a_start_from_another_run_has_the_optimizer_settings_of_its_recipe(
    parts: Parts, before: Optim, after: Optim
) -> None:
    """PyTorch restores the rate and the other settings of the checkpoint."""
    first = tasks.pretrain(**parts(max_steps=4) | {"optim": before})
    start = str(first.checkpoints / "step-00000004")
    run = tasks.pretrain(**parts(name="second", max_steps=8, resume=start) | {"optim": after})
    fresh = tasks.pretrain(**parts(name="fresh", max_steps=8) | {"optim": after})
    assert [lr for (lr,) in rows(run, "lr") if lr] == [lr for (lr,) in rows(fresh, "lr") if lr][4:]
    states = (json.loads((each.checkpoints / "step-00000008" / "state.json").read_text()) for each in (run, fresh))
    found, expected = (state["optimizer_states"][0]["param_groups"] for state in states)
    assert found == expected


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("32-true", "bf16-true", "was trained with float32 parameters; set 'bf16-mixed' or '32-true'"),
        ("bf16-true", "bf16-mixed", "was trained with bfloat16 parameters; set 'bf16-true'"),
    ],
)
def test_parameters_of_another_dtype_are_refused(pretrain: Pretrain, before: str, after: str, said: str) -> None:
    first = pretrain(max_steps=4, precision=before)
    with pytest.raises(ConfigError, match=rf"^trainer\.precision='{after}': .* {said}, or use model\.init_from"):
        pretrain(name="second", resume=str(first.checkpoints / "step-00000004"), precision=after)


def test_another_seed_gives_another_loss(pretrain: Pretrain, parts: Parts) -> None:
    one = pretrain(max_steps=1)
    other = tasks.pretrain(**parts(name="other", max_steps=1), seed=4321)
    assert rows(one, "loss")[0] != rows(other, "loss")[0]


# -- where a run starts from


def test_auto_is_the_newest_good_checkpoint(pretrain: Pretrain) -> None:
    run = pretrain()
    assert resume_point(run, "auto") == run.checkpoints / "step-00000012"
    assert resume_point(RunDirectory(run.path.parent / "new"), "auto") is None


def test_resume_never_refuses_a_run_with_a_checkpoint(pretrain: Pretrain) -> None:
    run = pretrain(max_steps=4)
    with pytest.raises(ConfigError, match="step-00000004, which would be lost"):
        pretrain(max_steps=8, resume="never")
    assert resume_point(RunDirectory(run.path.parent / "new"), "never") is None


def test_a_path_that_is_no_checkpoint_is_refused(pretrain: Pretrain, tmp_path: Path) -> None:
    run = pretrain(max_steps=4)
    new = RunDirectory(run.path.parent / "new")
    with pytest.raises(ConfigError, match="there is no such checkpoint"):
        resume_point(new, run.checkpoints / "step-00000005")
    with pytest.raises(ConfigError, match=r"unknown run 'rum' in .*; did you mean 'run'"):
        (run.path / "recipe.yaml").touch()
        resume_point(new, "rum")
    empty = RunDirectory(run.path.parent / "empty")
    empty.path.mkdir()
    empty.recipe.touch()
    with pytest.raises(ConfigError, match="the run has no good checkpoint"):
        resume_point(new, "empty")


def test_a_damaged_path_is_refused_and_not_passed_over(pretrain: Pretrain) -> None:
    run = pretrain(max_steps=4)
    (run.checkpoints / "step-00000004" / "model.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors has None of"):
        resume_point(RunDirectory(run.path.parent / "new"), run.checkpoints / "step-00000004")


def test_best_is_a_checkpoint(pretrain: Pretrain) -> None:
    run = pretrain(max_steps=4)
    best = run.checkpoints / "best"
    assert resume_point(RunDirectory(run.path.parent / "new"), best) == best


def test_a_run_that_starts_elsewhere_goes_on_with_its_own_progress(pretrain: Pretrain) -> None:
    first = pretrain(max_steps=4)
    start = first.checkpoints / "step-00000004"
    with pytest.raises(Killed):
        pretrain(name="second", resume=str(start), callbacks=[KillAfter(9)])
    second = RunDirectory(first.path.parent / "second")
    assert resume_point(second, start) == second.checkpoints / "step-00000008"


@pytest.mark.parametrize(("attempt", "warned"), [(1, False), (2, True)])
def test_a_fresh_start_where_progress_was_expected_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attempt: int, warned: bool
) -> None:
    run = RunDirectory(tmp_path)
    run.write_status(Status(State.RUNNING, attempt=attempt))
    assert resume_point(run, "auto") is None
    assert ("WARNING" in capsys.readouterr().out) is warned


# -- the data that it goes on with


def test_a_run_goes_on_with_other_data_only_if_told_to(
    pretrain: Pretrain, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(max_steps=4)
    sums = json.loads((run.checkpoints / "step-00000004" / "state.json").read_text())["data"]
    assert sums["train"] == [["train.bin", hashlib.sha256((dataset / "train.bin").read_bytes()).hexdigest()]]
    text = tmp_path / "text.txt"
    text.write_text("fern frond spore " * 100)
    other = tmp_path / "other"
    tokenize([text], ByteTokenizer(), other, val_fraction=0, workers=1, progress=False)
    with pytest.raises(ConfigError) as error:
        pretrain(max_steps=5, paths=other, val_samples=0)
    assert error.value.problems[0].startswith("data: train: train.bin is new or changed since")
    assert "data.allow_changed=False: set True" in error.value.problems[-1]
    pretrain(max_steps=5, paths=other, val_samples=0, allow_changed=True)
    pretrain(max_steps=6, paths=other, val_samples=0)  # the checkpoint has the new data's checksums
    assert "WARNING" not in capsys.readouterr().out.replace("WARNING: with max_steps", "")


def test_flipped_tokens_are_refused_at_a_start(pretrain: Pretrain, dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    tokens = bytearray((copy / "train.bin").read_bytes())
    tokens[101] = 0xFF  # beyond the vocabulary, which the model would stumble over
    (copy / "train.bin").write_bytes(tokens)
    with pytest.raises(ConfigError, match=r"data\.paths.*train\.bin: is not what was written"):
        pretrain(max_steps=1, paths=copy)
