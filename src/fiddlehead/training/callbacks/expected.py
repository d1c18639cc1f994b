"""Compares a run with its plan: once when it has warmed up, and again if it is much slower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.environment import describe_gpus
from fiddlehead.run.console import is_rank_zero, say
from fiddlehead.run.prediction import Prediction, difference
from fiddlehead.training.callbacks.checkpoint import at_step_end
from fiddlehead.training.callbacks.metrics import peak_memory
from fiddlehead.training.callbacks.phases import REST, Phases, Spent, exposed_communication

WARM_UP, COMPARED = 5, 10
"""The steps of an attempt that are not measured, and that after which plan and measurement are compared."""
AMORTIZED = 100
"""How many steps must be measured before checkpoints and validations count: a few have one by chance."""
SLOW = 0.7
"""Below this part of the planned speed, a run says why it is slow."""
THROTTLED = 0.6
"""Below this part of its highest clock, a GPU is throttled. A training's products lower the clock too, as they draw all
the power that the GPU may take, but less."""


class Expected(Callback):
    """Prints the planned and measured values at the attempt's tenth step, and once why the run is slow, if it is."""

    def __init__(self, predicted: Prediction, phases: Phases, every_n_steps: int) -> None:
        """Args: every_n_steps: how often to look whether the run has become slow."""
        self.predicted, self.phases, self.every_n_steps = predicted, phases, every_n_steps
        self.steps = 0
        self.warned = False
        self.begun = Spent()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares the run with its plan when that is due; only then does it wait for the device."""
        if not at_step_end(trainer):
            return
        self.steps += 1
        if self.steps == WARM_UP:
            self.begun = self.phases.so_far()
        due = self.steps > COMPARED and trainer.global_step % self.every_n_steps == 0 and not self.warned
        if self.steps != COMPARED and not due:
            return
        spent = self.phases.so_far().since(self.begun)
        if self.steps == COMPARED:
            memory = _of_all_ranks(peak_memory(pl_module.device), pl_module.device)
            say(_line(self.predicted, memory, spent, trainer.global_step))
        if is_rank_zero() and (cause := self._cause(trainer, pl_module.device, spent)):
            self.warned = True
            say(f"WARNING: {cause}")

    def _cause(self, trainer: Trainer, device: torch.device, spent: Spent) -> str:
        return slow_because(self.predicted, spent, exposed_communication(trainer), partial(_throttled, device))


def _of_all_ranks(value: float, device: torch.device) -> float:
    """The largest value of any rank."""
    if not torch.distributed.is_initialized():
        return value
    values = torch.tensor(value, device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return float(values)


def _line(predicted: Prediction, memory_gib: float, spent: Spent, step: int) -> str:
    said = []
    if predicted.tokens_per_s is not None:
        rate = predicted.tokens_per_step / spent.seconds_per_step
        said.append(f"{predicted.tokens_per_s:,.0f} tokens/s planned, {rate:,.0f} measured")
        said[-1] += f" ({difference(predicted.tokens_per_s, rate)})"
    if predicted.memory_gib is not None:
        said.append(f"{predicted.memory_gib:.2f} GiB planned, {memory_gib:.2f} measured")
        said[-1] += f" ({difference(predicted.memory_gib, memory_gib)})"
    return f"plan at step {step}: {'; '.join(said)}"


def slow_because(
    predicted: Prediction,
    spent: Spent,
    communication: float | None = None,
    throttled: Callable[[], str] = lambda: "",
) -> str:
    """Why a run is far below its plan, and what to look at; "" if it is not, or if the plan has no speed.

    It is the part of a step that takes most beyond its plan.

    Args:
        spent: by the measured steps.
        communication: the seconds of a step in which it waits for other ranks, if they were measured.
        throttled: says how far the GPU is below its clock; "" if it is not.
    """
    planned = predicted.seconds_per_step
    if planned is None or not spent.steps:
        return ""
    paused = spent.pauses if spent.steps >= AMORTIZED else {}
    step = spent.seconds_per_step + sum(paused.values()) / spent.steps
    if planned >= SLOW * step:
        return ""
    mean = {name: seconds / spent.steps for name, seconds in (*spent.phases.items(), *paused.items())}
    passes = mean.pop("forward") + mean.pop("backward") - (predicted.seconds_computing or 0.0)
    beyond = {**mean, "optimizer": mean["optimizer"] - (predicted.seconds_optimizer or 0.0), "passes": passes}
    if communication is None:
        beyond["passes"] -= predicted.seconds_communication or 0.0
    else:  # it is a part of the backward pass
        beyond["passes"] -= communication
        beyond["communication"] = communication - (predicted.seconds_communication or 0.0)
    part = max(beyond, key=lambda name: beyond[name])
    return (
        f"the run reaches {planned / step:.0%} of its planned speed on {predicted.gpu}: a step takes "
        f"{1000 * step:,.0f} ms, planned are {1000 * planned:,.0f} ms. Of the difference, "
        f"{1000 * beyond[part]:,.0f} ms are {_advice(part, predicted, throttled)}"
    )


def _advice(part: str, predicted: Prediction, throttled: Callable[[], str]) -> str:
    if part == "passes":
        if clocks := throttled():
            return f"in the forward and backward passes, and {clocks}"
        if predicted.gpus > 1:
            return "in the forward and backward passes, with what the ranks exchange in them: log.profile shows which"
        return "in the forward and backward passes: `fiddlehead attention explain` and log.profile show the kernels"
    return {
        "data": "waits for data: try more data.num_workers, or a faster disk",
        "communication": "waits for the gradients of other ranks: are the links between the GPUs those of the plan?",
        "optimizer": "in the optimizer's step",
        REST: "between steps, in logging and callbacks: try a larger trainer.log_every_n_steps",
        "checkpoint": "for writing checkpoints: try a larger checkpoint.every_n_steps, or checkpoint.asynchronous=true",
        "validation": "for validations: try a larger trainer.val_check_interval, or fewer data.val_samples",
        "profile": "for the profile",
    }[part]


def _throttled(device: torch.device) -> str:
    """Whether the GPU runs far below its clock, and by how much; "" if it does not, or that is not known."""
    if device.type != "cuda":
        return ""
    for gpu in describe_gpus(f"GPU-{torch.cuda.get_device_properties(device).uuid}"):
        if {"sm_mhz", "max_sm_mhz"} <= gpu.keys() and gpu["sm_mhz"] < THROTTLED * gpu["max_sm_mhz"]:
            more = [f"{gpu[name]:,.0f} {unit}" for name, unit in (("watts", "W"), ("celsius", "°C")) if name in gpu]
            at = f" at {', '.join(more)}" if more else ""
            return f"the GPU is throttled: {gpu['sm_mhz']:,.0f} of {gpu['max_sm_mhz']:,.0f} MHz{at}"
    return ""
