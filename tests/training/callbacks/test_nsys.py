"""Nsight Systems records the chosen steps, and no others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fiddlehead.errors import ConfigError
from fiddlehead.launch import plan
from fiddlehead.launch.fitting import missing_nsys
from fiddlehead.launch.local import local
from fiddlehead.launch.slurm import slurm
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.training import Log
from fiddlehead.training.callbacks.nsys import NEEDS_GPUS, Nsys


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA's profiler is told; this machine has no GPU."""
    words: list[str] = []

    @contextlib.contextmanager
    def marked(name: str) -> Iterator[None]:
        words.append(f"<{name}>")
        yield
        words.append(f"</{name}>")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: words.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: words.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: words.append("stop"))
    monkeypatch.setattr(Nsys, "range", marked)
    return words


def train(steps: range, callback: Nsys) -> Any:
    """What Lightning does around each micro-batch, of which a step has two."""
    device = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(is_global_zero=True, strategy=device, profiler="theirs")
    loop = SimpleNamespace(_should_accumulate=lambda: trainer.accumulating)
    trainer.fit_loop = SimpleNamespace(epoch_loop=loop)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    for step in steps:
        for micro in (0, 1):
            trainer.global_step, trainer.accumulating = step - 1, micro == 0
            callback.on_train_batch_start(trainer, None, None, micro)  # type: ignore[arg-type]
            trainer.global_step += micro
            callback.on_train_batch_end(trainer, None, None, None, micro)  # type: ignore[arg-type]
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    return trainer


def test_cuda_s_profiler_is_on_in_the_chosen_steps(told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    paused: list[str] = []
    trainer = train(range(1, 6), Nsys((2, 3), SimpleNamespace(pause=paused.append)))  # type: ignore[arg-type]
    assert told == ["wait", "start", "<step 2>", "</step 2>", "<step 3>", "</step 3>", "wait", "stop"]
    assert trainer.profiler == "theirs" and paused == ["profile", "profile"]
    assert "nsys: steps 2 to 3 are recorded" in capsys.readouterr().out


def test_a_run_that_resumes_in_the_middle_of_the_steps_records_the_rest(told: list[str]) -> None:
    train(range(3, 4), Nsys((2, 7), SimpleNamespace(pause=lambda what: None)))  # type: ignore[arg-type]
    assert told == ["wait", "start", "<step 3>", "</step 3>", "wait", "stop"]


@pytest.mark.parametrize(
    ("given", "said"), [({"nsys": "3"}, "nsys='3': must be"), ({"profile": "2:3", "nsys": "2:3"}, "one")]
)
def test_wrong_steps_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Log(**given)


def test_a_plan_says_where_it_cannot_be(working_directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    recipe = tiny_test()
    recipe.log.nsys = "2:31"
    assert plan(recipe, local()).problems == ("log.nsys='2:31': " + NEEDS_GPUS,)
    recipe.trainer.accelerator = "gpu"
    made = plan(recipe, target="h100")
    assert made.problems == ("log.nsys='2:31': the run ends with step trainer.max_steps=30",)
    assert missing_nsys(recipe, local()).startswith("log.nsys='2:31': there is no nsys in the PATH")
    assert not missing_nsys(recipe, local(setup_lines="module load nsight")) and not missing_nsys(recipe, slurm())
    assert "name an executor for it" in missing_nsys(recipe, None)
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    assert not missing_nsys(recipe, None)
