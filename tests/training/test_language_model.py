"""The Lightning module: its loss, clipping, accumulation, and steps that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from fiddlehead import tasks
from fiddlehead.models import linear_cross_entropy
from fiddlehead.models.scaled import multiply_
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import LanguageModel, NonFiniteError
from tests.training.conftest import Parts, parameters, rows

Pretrain = Callable[..., RunDirectory]


def here(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Probe(Callback):
    """Remembers the gradients of each step as the optimizer sees them, and the batches."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.batches: list[dict[str, torch.Tensor]] = []
        self.before: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.before.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [here(p.grad).flatten() for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.gradients.append(torch.cat(gradients).clone())


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(parts: Parts) -> None:
    made, probe = parts(max_steps=1), Probe()
    made["trainer"].callbacks.append(probe)
    run = tasks.pretrain(**made)
    model: LanguageModel = made["model"]
    model.load_state_dict(probe.before[0])
    batch = probe.batches[0]
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    with torch.no_grad():
        log_p = model(batch["input_ids"]).log_softmax(dim=-1)
    expected = -log_p.gather(-1, batch["labels"][..., None]).mean()
    assert float(rows(run, "loss")[0][0]) == pytest.approx(expected.item(), rel=1e-6)


def test_validation_is_weighted_by_tokens_and_bytes(parts: Parts) -> None:
    """Seven windows in batches of four: the last batch is smaller."""
    made = parts(max_steps=4, val_samples=7)
    run = tasks.pretrain(**made)
    model, data = made["model"], made["data"]
    nats = tokens = text_bytes = 0.0
    for batch in data.val_dataloader():
        labels = batch["labels"].flatten()
        with torch.no_grad():
            nats += F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), labels, reduction="sum").item()
        tokens += labels.numel()
        text_bytes += data.token_bytes[labels].sum().item()
    assert tokens == 7 * 16 and 0 < text_bytes < tokens  # the end of a document is a token and no byte
    (found,) = [row for row in rows(run, "val_loss", "val_nats_per_byte") if row[0]]
    assert [float(value) for value in found] == pytest.approx([nats / tokens, nats / text_bytes], rel=1e-5)


def test_accumulating_micro_batches_is_one_larger_batch(pretrain: Pretrain) -> None:
    names = ("loss", "grad_norm", "tokens")
    large = pretrain(name="large", micro_batch_size=12, global_batch_size=12, max_steps=4)
    small = pretrain(name="small", micro_batch_size=2, global_batch_size=12, max_steps=4)
    for a, b in zip(rows(small, *names), rows(large, *names), strict=True):
        assert [float(x or 0) for x in a] == pytest.approx([float(x or 0) for x in b], rel=1e-6)
    # Adam divides by the gradient's size, so a rounding of a gradient near zero is not small there.
    for name, tensor in parameters(large, 4).items():
        torch.testing.assert_close(parameters(small, 4)[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_gradients_that_the_loss_leaves_are_not_multiplied_again(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, micro_batches: int
) -> None:
    """Also where Lightning divides the loss by the number of micro-batches, before the backward pass."""
    factors: list[float] = []

    def noted(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        factors.append(float(factor))
        return multiply_(x, factor)

    monkeypatch.setattr(linear_cross_entropy, "multiply_", noted)
    pretrain(micro_batch_size=2, global_batch_size=2 * micro_batches, max_steps=2)
    assert factors == [1.0] * (2 * 2 * micro_batches)  # of the hidden states, and of the weight


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_to_the_norm_and_logged_as_they_were(
    pretrain: Pretrain, precision: str, apart: bool
) -> None:
    probe = Probe()
    settings = {"precision": precision, "separate_documents": apart, "callbacks": [probe]}
    run = pretrain(max_steps=3, gradient_clip_val=0.25, **settings)
    before = [float(row[0]) for row in rows(run, "grad_norm") if row[0]]
    after = [gradients.norm().item() for gradients in probe.gradients]
    assert len(after) >= 2 and all(norm > 0.5 for norm in before)
    assert after == pytest.approx([0.25] * len(after), rel=1e-4)


def test_no_gradient_is_kept_while_the_next_step_computes_its_own(pretrain: Pretrain) -> None:
    class Held(Callback):
        def __init__(self) -> None:
            self.held: list[int] = []
            self.seen: list[int] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.held.append(sum(p.grad is not None for p in pl_module.parameters()))

        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            self.seen.append(sum(p.grad is not None for p in pl_module.parameters()))

    held = Held()
    pretrain(callbacks=[held], max_steps=3)
    assert held.held == [0, 0, 0]
    assert len([count for count in held.seen if count]) == 3, "a callback sees the gradients of each step"


@pytest.mark.parametrize("limit", [None, 0, 1e9])
def test_without_a_limit_gradients_stay_as_they_are(pretrain: Pretrain, limit: float | None) -> None:
    probe = Probe()
    run = pretrain(max_steps=3, gradient_clip_val=limit, callbacks=[probe])
    before = [float(row[0]) for row in rows(run, "grad_norm") if row[0]]
    after = [gradients.norm().item() for gradients in probe.gradients]
    assert after == pytest.approx(before[: len(after)], rel=1e-5) and after[0] > 0.5


class Poison(Callback):
    """Spoils a gradient, or the loss, of one step."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value
        self.before: dict[str, torch.Tensor] = {}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 == self.step and not self.before:
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient[0, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("accumulate", "apart"), [(1, False), (2, False), (2, True)])
def test_a_step_that_is_not_finite_is_not_taken(
    parts: Parts, accumulate: int, apart: bool, precision: str, value: float
) -> None:
    poison = Poison(6, value)
    sizes = {"micro_batch_size": 4 // accumulate, "global_batch_size": 4}
    made = parts(callbacks=[poison], precision=precision, separate_documents=apart, **sizes)
    with pytest.raises(NonFiniteError) as error:
        tasks.pretrain(**made)
    data, model = made["data"], made["model"]
    assert str(error.value).startswith("step 6: ")
    assert f"samples {data.batch_indices(5)}. " in str(error.value)
    assert str(error.value).endswith("step-00000004")
    assert all(torch.equal(p, poison.before[name]) for name, p in model.named_parameters())
    run = RunDirectory(Path(made["log"].dir) / "run")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best", "step-00000004"]
    assert rows(run, "step")[-1] == ("5",)


def test_a_loss_that_is_not_finite_is_noticed(pretrain: Pretrain) -> None:
    class BadWeights(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                next(pl_module.parameters()).data.fill_(math.nan)

    with pytest.raises(NonFiniteError, match=r"^step 3: "):
        pretrain(callbacks=[BadWeights()])


def test_nothing_is_saved_after_a_step_that_was_not_finite(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking at each step would stall it: the step is taken, and the next checkpoint is not."""
    clip = LanguageModel.configure_gradient_clipping

    def clip_without_looking(self: LanguageModel, *arguments: Any, **named: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModel, "raise_if_non_finite", lambda self: None)
            clip(self, *arguments, **named)

    monkeypatch.setattr(LanguageModel, "configure_gradient_clipping", clip_without_looking)
    with pytest.raises(NonFiniteError, match=r"^step 6: "):
        pretrain(callbacks=[Poison(6, math.nan)], log_every_n_steps=12, val_check_interval=12)


def test_the_parameters_are_made_late(parts: Parts) -> None:
    made = parts(max_steps=1)
    assert not list(made["model"].parameters())
    with pytest.raises(AttributeError, match=r"the model has no parameters yet: call configure_model\(\) first"):
        made["model"](torch.zeros(1, 4, dtype=torch.int64))
    tasks.pretrain(**made)
    made_once = made["model"].transformer
    made["model"].configure_model()
    assert made["model"].transformer is made_once
