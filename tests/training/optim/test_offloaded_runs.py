"""Whole runs with the optimizer's state in main memory: their checkpoints are those of runs without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fiddlehead import tasks
from fiddlehead.training.optim import adamw
from fiddlehead.training.optim.bfloat16_adamw import OffloadedBFloat16AdamW
from fiddlehead.training.optim.clipping_adamw import OffloadedClippingAdamW
from fiddlehead.training.optim.offloaded import Offloaded
from tests.training.conftest import KillAfter, Killed, Parts
from tests.training.layouts import LAYOUTS, TRAINED, train_here
from tests.training.optim.test_offloaded import kernel_on_a_cpu as kernel_on_a_cpu
from tests.training.ranks import on_ranks

LONG = pytest.mark.long


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    assert any(name.startswith("optimizer") for name in files)
    return files


def offload(set_: Callable[[Any, str, Any], None] = setattr) -> list[Any]:
    """Makes a CPU stand for a GPU, whose state is in main memory; notes its optimizers at each step."""
    taken, take = [], Offloaded.take
    set_(Offloaded, "take", lambda self, *others: (taken.append(self), take(self, *others)))
    set_(adamw, "BFloat16AdamW", OffloadedBFloat16AdamW)
    set_(adamw, "ClippingAdamW", OffloadedClippingAdamW)
    set_(Offloaded, "piece", 50)
    return taken


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_checkpoints_are_the_same_and_runs_go_on_from_either(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    settings = {"precision": precision, "state_offloading": False}
    whole = tasks.pretrain(**parts(name="whole", **settings))
    with pytest.raises(Killed):
        tasks.pretrain(**parts(name="switched", callbacks=[KillAfter(5)], **settings))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        taken = offload(patched.setattr)
        changes = settings | {"state_offloading": True}
        tasks.pretrain(**parts(name="switched", callbacks=[KillAfter(9)], **changes))
    assert len(taken) == 5
    switched = tasks.pretrain(**parts(name="switched", **settings))
    for step in (8, 12):
        folders = [run.checkpoints / f"step-{step:08d}" for run in (whole, switched)]
        assert tensors_of(folders[0]) == tensors_of(folders[1])


def train_offloaded(*arguments: Any, **changes: Any) -> None:
    taken = offload()
    train_here(*arguments, **changes)
    assert len(taken) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp-2", *(pytest.param(x, marks=LONG) for x in ("fsdp-2-tp-2", "pp-2-fsdp-2"))])
def test_ranks_save_and_read_their_shards(dataset: Path, tmp_path: Path, layout: str) -> None:
    devices, strategy = LAYOUTS[layout]
    changes = TRAINED | {"devices": devices, "precision": "bf16-true", "every_n_steps": 2}
    on_ranks(devices, train_here, strategy, dataset, tmp_path, name="whole", **changes)
    for train, killed_after in ((train_offloaded, 3), (train_here, 5), (train_offloaded, None)):
        on_ranks(devices, train, strategy, dataset, tmp_path, killed_after, name="switched", **changes)
    for step in (2, 4, 6):
        folders = [tmp_path / name / "checkpoints" / f"step-{step:08d}" for name in ("whole", "switched")]
        assert tensors_of(folders[0]) == tensors_of(folders[1])
