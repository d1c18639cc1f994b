"""Ranks that only share layers are trained on as one device is: without FSDP2, and with autocast in mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule

from fiddlehead import tasks
from fiddlehead.models import LoRA
from fiddlehead.models.parallel import local
from fiddlehead.training import Parallel
from fiddlehead.training.distributed.sizes import Sizes
from tests.training.conftest import Killed, make_parts
from tests.training.layouts import LAYOUTS, losses, train
from tests.training.ranks import on_ranks

LONG = pytest.mark.long
ODD: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 10,
    "ffn_hidden_size": 46,
    "vocab_size": 301,
    "seq_length": 26,
}
"""Sizes that are not multiples of 8."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": ODD | {"add_bias_linear": True, "attention_sinks": True, "separate_documents": True},
    "tied": ODD | {"share_embeddings_and_output_weights": True, "norm_placement": "both", "qk_layernorm": "head"},
    "projection norms": ODD | {"qk_layernorm": "projection", "position_embedding_type": "learned_absolute"},
    "experts": {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.1, "add_bias_linear": True},
    "tiled": ODD | {"activation_checkpointing": "full", "tiled_mlp": 5, "activation_offloading": True},
    "selective": ODD | {"activation_checkpointing": "selective"},
}
MIXED: dict[str, Any] = {"precision": "bf16-mixed", "gradient_clip_val": None}


class Gradients(Callback):
    """Keeps the whole gradients of the first step, and what trains; and ends the run."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 0:
            return
        strategy: Any = trainer.strategy
        layout = getattr(strategy, "layout", None)
        self.found = {}
        for name, parameter in pl_module.named_parameters():
            if (gradient := parameter.grad) is not None:
                assert gradient.dtype == torch.float32, name
                self.found[name] = (local(gradient) if layout is None else layout.gather(name, gradient)).numpy()
        self.fsdp = any(isinstance(module, FSDPModule) for module in pl_module.modules())
        self.dtypes = {(p.requires_grad, p.dtype) for p in pl_module.parameters()}
        raise Killed


def first_step(dataset: Path, runs: Path, strategy: dict[str, Any] | None = None, **changes: Any) -> Gradients:
    kept = Gradients()
    if strategy is not None:
        changes |= {"strategy": Parallel(**strategy), "devices": 2}
    with pytest.raises(Killed):
        tasks.pretrain(**make_parts(dataset, runs, callbacks=[kept], **changes))
    return kept


def on_two(dataset: Path, runs: Path, strategy: dict[str, Any], **changes: Any) -> list[tuple[Any, bool, Any]]:
    return on_ranks(2, _on_two, dataset, runs, strategy, **changes)


def _on_two(*arguments: Any, **changes: Any) -> tuple[Any, bool, Any]:
    kept = first_step(*arguments, **changes)
    return kept.found, kept.fsdp, kept.dtypes


@pytest.mark.parametrize(
    "kind", ["odd", "experts", *(pytest.param(x, marks=LONG) for x in KINDS if x not in ("odd", "experts"))]
)
def test_gradients_in_mixed_precision_are_as_exact_as_those_of_one_device(
    dataset: Path, tmp_path: Path, kind: str
) -> None:
    exact = first_step(dataset, tmp_path / "exact", **KINDS[kind], precision="32-true").found
    alone = first_step(dataset, tmp_path / "one", **KINDS[kind], **MIXED).found
    for gradients, fsdp, dtypes in on_two(dataset, tmp_path / "two", {"tensor_parallel": 2}, **KINDS[kind], **MIXED):
        assert not fsdp and dtypes == {(True, torch.float32)}
        assert gradients.keys() == exact.keys()
        for name, expected in exact.items():
            size = float(abs(expected).max())
            rounded, found = (abs(each[name] - expected).max() / size for each in (alone, gradients))
            assert found <= 2 * rounded + 2**-8, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_clip_val": 0.5},
        pytest.param({"compile": "layers"}, marks=LONG),
        pytest.param({"compile": "layers", "activation_checkpointing": "full", "tiled_mlp": 5}, marks=LONG),
        pytest.param({"precision": "bf16-true"}, marks=LONG),
        pytest.param({"state_offloading": True}, marks=LONG),
    ],
    ids=["clipped", "compiled", "compiled and tiled", "bf16-true", "offloaded"],
)
def test_losses_in_bfloat16_are_close_to_those_of_one_device(
    dataset: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = ODD | {"precision": "bf16-mixed", "lr": 3e-3} | changes  # eight micro-batches are accumulated in a step
    runs = [train(layout, dataset, tmp_path / layout, **changes) for layout in ("1", "tp-2")]
    found, expected = (losses(run) for run in runs)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=5e-3, atol=0)
    torch.testing.assert_close(found[:, 2], expected[:, 2], rtol=5e-3, atol=0)


@pytest.mark.parametrize("dora", [True, pytest.param(False, marks=LONG)])
def test_frozen_weights_are_in_bfloat16_as_on_one_device(
    dataset: Path, one: Callable[[str], Path], tmp_path: Path, dora: bool
) -> None:
    changes = {"init_from": one("plain"), "lora": LoRA(rank=3, dora=dora), "precision": "bf16-mixed"}
    for _, fsdp, dtypes in on_two(dataset, tmp_path / "start", {"tensor_parallel": 2}, **changes):
        assert not fsdp and dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    alone = train("1", dataset, tmp_path / "one", **changes)
    train("tp-2", dataset, tmp_path, killed_after=4, **changes)
    run = train("tp-2", dataset, tmp_path, **changes)
    torch.testing.assert_close(losses(run)[:, 0], losses(alone)[:, 0], rtol=5e-3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fsdp_has_the_parameters_unless_ranks_only_share_layers(layout: str) -> None:
    devices, fields = LAYOUTS[layout]
    sizes = Parallel(**fields).sizes(devices)
    assert sizes.fsdp == (layout not in ("1", "tp-2", "tp-4"))


def test_replicas_exchange_gradients_by_fsdp() -> None:
    assert Sizes(data=2, replicate=2, tensor=2).fsdp
