"""Runs of one process and of many, for comparison."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddlehead import tasks
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import Muon, Parallel
from tests.training.conftest import KillAfter, Killed, make_parts, rows
from tests.training.ranks import on_ranks

TRAINED = {"max_steps": 6, "global_batch_size": 16, "micro_batch_size": 2, "val_check_interval": 3}
TRAINED |= {"every_n_steps": 3}
_TWICE: dict[str, Any] = {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "fsdp-2": (2, {}),
    "fsdp-4": (4, {"reshard_after_forward": False}),
    "hsdp-2x2": (4, {"data_parallel_replicate": 2}),
    "cp-2": (2, {"context_parallel": 2}),
    "fsdp-2-cp-2": (4, {"context_parallel": 2}),
    "ring-2": (2, {"context_parallel": 2, "context_parallel_method": "ring"}),
    "fsdp-2-ring-2": (4, {"context_parallel": 2, "context_parallel_method": "ring"}),
    "pp-2-ring-2": (4, {"context_parallel": 2, "context_parallel_method": "ring", "pipeline_parallel": 2}),
    "tp-2": (2, {"tensor_parallel": 2}),
    "tp-4": (4, {"tensor_parallel": 4}),
    "fsdp-2-tp-2": (4, {"tensor_parallel": 2}),
    "cp-2-tp-2": (4, {"context_parallel": 2, "tensor_parallel": 2}),
    "pp-2": (2, {"pipeline_parallel": 2}),
    "pp-2-twice": (2, {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2}),
    "pp-4": (4, {"pipeline_parallel": 4}),
    "pp-2-zero": (2, {"pipeline_parallel": 2, "pipeline_schedule": "InterleavedZeroBubble"}),
    "pp-4-zero": (4, {"pipeline_parallel": 4, "pipeline_schedule": "InterleavedZeroBubble"}),
    "pp-2-twice-zero": (2, _TWICE | {"pipeline_schedule": "InterleavedZeroBubble"}),
    "pp-2-zbv": (2, _TWICE | {"pipeline_schedule": "ZBVZeroBubble"}),
    "pp-2-zbv-fsdp-2": (4, _TWICE | {"pipeline_schedule": "ZBVZeroBubble"}),
    "pp-2-dual": (2, _TWICE | {"pipeline_schedule": "DualPipeV"}),
    "pp-2-dual-cp-2": (4, _TWICE | {"pipeline_schedule": "DualPipeV", "context_parallel": 2}),
    "pp-2-fsdp-2": (4, {"pipeline_parallel": 2}),
    "pp-2-twice-fsdp-2": (4, {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2}),
    "pp-2-tp-2": (4, {"pipeline_parallel": 2, "tensor_parallel": 2}),
    "pp-2-cp-2": (4, {"pipeline_parallel": 2, "context_parallel": 2}),
    "pp-2-ep-2": (4, {"pipeline_parallel": 2, "expert_parallel": 2}),
    "ep-2": (2, {"expert_parallel": 2}),
    "fsdp-2-ep-2": (4, {"expert_parallel": 2}),
    "hsdp-2x2-ep-2": (8, {"data_parallel_replicate": 2, "expert_parallel": 2}),
    "ep-2-tp-2": (4, {"expert_parallel": 2, "tensor_parallel": 2}),
    "ep-2-cp-2": (4, {"expert_parallel": 2, "context_parallel": 2}),
    "hsdp-2x2-tp-2": (8, {"data_parallel_replicate": 2, "tensor_parallel": 2}),
    "hsdp-2x2-cp-2": (8, {"data_parallel_replicate": 2, "context_parallel": 2}),
}
_MIXTURE = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.1}
SETTINGS = {
    "plain": {},
    "documents": {"separate_documents": True},
    "experts": _MIXTURE | {"attention_sinks": True, "add_bias_linear": True},
    "muon": {"optim": Muon, "num_moe_experts": 4},
    "deep": {"num_layers": 4, "separate_documents": True, "share_embeddings_and_output_weights": True},
    "mixture": _MIXTURE | {"separate_documents": True, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "odd": {"num_layers": 5, "separate_documents": True},
    "odd mixture": _MIXTURE | {"num_layers": 5, "hidden_dropout": 0.1},
    "tied": {"share_embeddings_and_output_weights": True, "optim": Muon, "hidden_dropout": 0.1},
}


def train(layout: str, dataset: Path, runs: Path, *, killed_after: int | None = None, **changes: Any) -> Path:
    """Trains on as many ranks as `layout` has, and returns the run's folder."""
    devices, strategy = LAYOUTS[layout]
    arguments = (strategy, dataset, runs, killed_after)
    changes = TRAINED | changes | {"devices": devices}
    if devices == 1:
        train_here(*arguments, **changes)
    else:
        on_ranks(devices, train_here, *arguments, **changes)
    return runs / changes.get("name", "run")


def train_here(
    strategy: dict[str, Any], dataset: Path, runs: Path, killed_after: int | None = None, **changes: Any
) -> None:
    """Trains on the ranks that call this."""
    if changes["devices"] > 1:
        changes["strategy"] = Parallel(**strategy)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attention: ")  # of calls that the plan did not foresee, on any rank
        if killed_after is None:
            tasks.pretrain(**make_parts(dataset, runs, **changes))
        else:
            with pytest.raises(Killed):
                tasks.pretrain(**make_parts(dataset, runs, callbacks=[KillAfter(killed_after)], **changes))


def losses(run: Path) -> torch.Tensor:
    """Loss, gradient norm and validation loss of each step."""
    values = [[float(value or 0) for value in row] for row in rows(RunDirectory(run), "loss", "grad_norm", "val_loss")]
    return torch.tensor(values, dtype=torch.float64)
