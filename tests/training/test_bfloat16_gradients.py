"""Gradients of the layers' weights that stay bfloat16: the same training, bit for bit, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead import tasks
from fiddlehead.plan.memory import moments
from fiddlehead.plan.rank_memory import Devices, Training
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import Muon, language_model
from fiddlehead.training.bfloat16_gradients import makes_bfloat16_gradients
from fiddlehead.training.distributed.sizes import Sizes
from tests.training.conftest import KillAfter, Killed, Parts, parameters, plan_of, rows

Pretrain = Callable[..., RunDirectory]
MIXED: dict[str, Any] = {"precision": "bf16-mixed", "max_steps": 4, "val_check_interval": 2, "gradient_clip_val": 0.5}
COLUMNS = "step", "loss", "grad_norm", "val_loss"


class Dtypes(Callback):
    """Notes which parameters have bfloat16 gradients, and that nothing else changes."""

    def __init__(self) -> None:
        self.bfloat16: set[str] = set()
        self.bytes = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = [(name.removeprefix("transformer."), p) for name, p in pl_module.named_parameters()]
        assert all(isinstance(p, torch.nn.Parameter) and p.dtype == torch.float32 for _, p in named)
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        assert gradients.keys() == {name for name, _ in named}
        self.bfloat16 = {name for name, gradient in gradients.items() if gradient.dtype == torch.bfloat16}
        self.bytes = sum(gradient.nbytes for gradient in gradients.values())


def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on gradients are float32, as autocast makes them."""
    monkeypatch.setattr(language_model, "makes_bfloat16_gradients", lambda *_, **__: False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile": "layers"},
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01},
        {"add_bias_linear": True, "activation": "gelu", "hidden_size": 24, "separate_documents": True},
        {"gradient_clip_val": None, "num_query_groups": 1, "qk_layernorm": "head"},
    ],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_training_is_the_same_bit_for_bit(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings, seen, wide = MIXED | changes, Dtypes(), Dtypes()
    narrow = pretrain(name="bfloat16", callbacks=[seen], **settings)
    widened(monkeypatch)
    before = pretrain(name="float32", callbacks=[wide], **settings)
    assert not wide.bfloat16
    assert {name.rpartition(".")[2] for name in seen.bfloat16} == {"weight"}
    products = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", *(["router"] * ("num_moe_experts" in changes))}
    assert {name.split(".")[-2] for name in seen.bfloat16} == products
    assert rows(narrow, *COLUMNS) == rows(before, *COLUMNS)
    found, expected = parameters(narrow, 4), parameters(before, 4)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"micro_batch_size": 2, "global_batch_size": 4}, "gradients are added up"),
        ({"precision": "32-true"}, "products are float32"),
        ({"optim": Muon}, "its step takes float32"),
        ({"activation_checkpointing": "full"}, "copies of weights are not kept"),
        ({"tiled_mlp": 8}, "tiles are added up"),
        ({"tiled_attention": 1}, "tiles are added up"),
    ],
)
def test_gradients_are_float32_where_they_are_added_up_or_nothing_is_saved(
    pretrain: Pretrain, changes: dict[str, Any], why: str
) -> None:
    seen = Dtypes()
    pretrain(callbacks=[seen], **{**MIXED, "max_steps": 2, **changes})
    assert seen.bytes and not seen.bfloat16, why


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("changes", [{}, {"compile": "layers"}, {"num_moe_experts": 4, "moe_router_topk": 2}])
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_are_added_up_in_float32(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, micro_batches: int, changes: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    settings, seen = {**MIXED, "micro_batch_size": 2, "global_batch_size": 2 * micro_batches, **changes}, Dtypes()
    run = pretrain(name="now", callbacks=[seen], **settings)
    assert seen.bytes and not seen.bfloat16
    widened(monkeypatch)
    before = pretrain(name="before", **settings)
    assert rows(run, *COLUMNS) == rows(before, *COLUMNS)
    found, expected = parameters(run, 4), parameters(before, 4)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_goes_on_bit_for_bit(pretrain: Pretrain) -> None:
    settings = {**MIXED, "max_steps": 6, "every_n_steps": 2}
    whole = pretrain(name="whole", **settings)
    with pytest.raises(Killed):
        pretrain(name="killed", callbacks=[KillAfter(3)], **settings)
    again = pretrain(name="killed", **settings)
    found = parameters(again, 6)
    assert all(torch.equal(found[name], tensor) for name, tensor in parameters(whole, 6).items())
    assert rows(again, *COLUMNS)[-2:] == rows(whole, *COLUMNS)[-2:]


def test_only_one_device_makes_them(parts: Parts) -> None:
    made = parts(**MIXED)
    model, optim, strategy = made["model"], made["optim"], made["trainer"].strategy
    how = {"precision": "bf16-mixed", "strategy": strategy, "devices": 1}
    assert makes_bfloat16_gradients(model, optim, **how)
    others: list[dict[str, Any]] = [
        {"devices": 2},
        {"precision": "bf16-true"},
        {"strategy": None},
    ]
    for other in others:
        assert not makes_bfloat16_gradients(model, optim, **(how | other))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_moe_experts": 4, "moe_router_topk": 2, "num_layers": 3},
        {"add_bias_linear": True, "activation": "gelu", "share_embeddings_and_output_weights": False},
        {"micro_batch_size": 2, "global_batch_size": 4},
        {"activation_checkpointing": "full"},
        {"precision": "32-true"},
    ],
)
def test_the_plan_counts_the_gradients_that_a_step_leaves(parts: Parts, changes: dict[str, Any]) -> None:
    seen = Dtypes()
    made = parts(callbacks=[seen], **{**MIXED, "max_steps": 1, "val_samples": 0, **changes})
    tasks.pretrain(**made)
    model = made["model"]
    training = Training(model, model.on_meta(), made["data"], Devices.of(made["trainer"]), made["optim"])
    held, setting = training.held(Sizes(1, 1)), training.setting(Sizes(1, 1))
    found = moments(model.config, held, setting)
    assert found["optimizer"].gradients == found["embedding"].gradients == seen.bytes
    plan = plan_of(parts(**{**MIXED, **changes}, name="planned"))
    assert plan.state_gib * 2**30 == pytest.approx(held.parameters + seen.bytes + held.optimizer)
    assert plan.checkpoint_bytes == held.parameters + held.optimizer
