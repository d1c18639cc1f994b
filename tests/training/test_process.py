"""A run restores the state of its process."""

from __future__ import annotations

import gc
import os
import random
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import process
from tests.training.conftest import KillAfter, Killed

Pretrain = Callable[..., RunDirectory]


def state() -> dict[str, Any]:
    """What a program that starts a run, and then another, would notice."""
    return {
        "variables": dict(os.environ),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # pyright: ignore
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "budget": torch._functorch.config.activation_memory_budget,  # pyright: ignore
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "warnings": list(warnings.filters),
    }


class BadEnd(Callback):
    """Fails where others clean up."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        raise OSError("the disk is full")


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("ends", ["well", "killed", "badly"])
def test_the_process_is_restored_however_the_run_ends(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, ends: str
) -> None:
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.delenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", raising=False)  # set by whatever compiled before
    monkeypatch.setattr("fiddlehead.models.speed.torch.compile", lambda function, **options: function)
    callbacks = {"well": [], "killed": [KillAfter(1)], "badly": [BadEnd(), KillAfter(1)]}[ends]
    before = state()
    with nullcontext() if ends == "well" else pytest.raises((Killed, OSError)):
        pretrain(max_steps=2, compile="layers", activation_checkpointing=0.5, callbacks=callbacks)
    assert state() == before


def test_variables_that_anything_sets_or_removes_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIDDLEHEAD_TEST_KEPT", "before")
    monkeypatch.setenv("FIDDLEHEAD_TEST_REMOVED", "before")
    before = dict(os.environ)
    with process.process_restored():
        os.environ["FIDDLEHEAD_TEST_KEPT"] = "changed"
        os.environ["FIDDLEHEAD_TEST_NEW"] = "new"
        del os.environ["FIDDLEHEAD_TEST_REMOVED"]
    assert dict(os.environ) == before


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with process.process_restored():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
