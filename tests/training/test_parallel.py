"""Many ranks train what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fiddlehead import tasks
from fiddlehead.runs import RunDirectory
from fiddlehead.training import Parallel
from tests.training.conftest import make_parts, rows
from tests.training.ranks import on_ranks

TRAINED = {"max_steps": 20, "global_batch_size": 16, "micro_batch_size": 2, "val_check_interval": 10}
LAYOUTS = {"fsdp-2": (2, {}), "hsdp-2x2": (4, {"data_parallel_replicate": 2})}


def train(dataset: Path, runs: Path, strategy: dict[str, Any] | None = None, **changes: Any) -> None:
    """Trains on these ranks, sharded as `strategy` says."""
    if strategy is not None:
        changes["strategy"] = Parallel(**strategy)
    tasks.pretrain(**make_parts(dataset, runs, **changes))


def losses(run: Path) -> torch.Tensor:
    """Loss, gradient norm and validation loss of each step."""
    values = [[float(value or 0) for value in row] for row in rows(RunDirectory(run), "loss", "grad_norm", "val_loss")]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"separate_documents": True}, {"num_moe_experts": 4, "attention_sinks": True}],
    ids=["plain", "documents", "experts"],
)
def test_the_losses_are_those_of_one_process(
    dataset: Path, tmp_path: Path, layout: str, settings: dict[str, Any]
) -> None:
    devices, strategy = LAYOUTS[layout]
    train(dataset, tmp_path / "one", **TRAINED, **settings)
    on_ranks(devices, train, dataset, tmp_path / "many", strategy, devices=devices, **TRAINED, **settings)
    one, many = losses(tmp_path / "one" / "run"), losses(tmp_path / "many" / "run")
    assert one.shape == many.shape == (22, 3)
    torch.testing.assert_close(many, one, rtol=1e-5, atol=0)
