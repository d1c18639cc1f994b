"""What is wrong with a trainer's callbacks: those that do not go with a run, and those that watch what is not there."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.errors import Problem
from fiddlehead.training import LanguageModel

_SILENT = (
    "fiddlehead.",
    *(f"lightning.pytorch.callbacks.{name}" for name in ("device_stats_monitor", "model_summary", "progress", "timer")),
)
"""The modules whose callbacks and models log nothing that another callback can watch, but what `VALIDATION` has."""
_REFUSED: dict[type, str] = {
    BatchSizeFinder: "data.micro_batch_size says it, and --fit finds the fastest that fits; leave it out",
    GradientAccumulationScheduler: "data.global_batch_size decides it, for the whole run; leave it out",
    LearningRateFinder: "its steps would be part of the run; leave it out, and try several optim.lr",
    StochasticWeightAveraging: "it averages after epochs, and a run is one epoch; EMAWeightAveraging counts steps",
}
"""Lightning's callbacks that change what a recipe says elsewhere, or would do nothing, and what to do instead."""


def callback_problems(trainer: Trainer) -> list[Problem]:
    """The callbacks of Lightning that do not go with a run."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        Problem(f"trainer.callbacks[{number}]", message=f"{kind.__name__}: {reason}")
        for number, each in enumerate(callbacks)
        for kind, reason in _REFUSED.items()
        if isinstance(each, kind)
    ]


def monitor_problems(
    trainer: Trainer, model: LanguageModel, data: PreTrainingDataModule | FineTuningDataModule
) -> list[Problem]:
    """The problems of callbacks such as `EarlyStopping`, which watch a metric that is never logged.

    A callback or a model that others wrote may log anything; then Lightning finds out in the first validation.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    others = [each for each in (model, *callbacks) if not isinstance(each, EarlyStopping)]
    if any(not type(each).__module__.startswith(_SILENT) for each in others):
        return []
    problems = []
    for number, each in enumerate(callbacks):
        if isinstance(each, EarlyStopping) and each.strict:
            path = f"trainer.callbacks[{number}].monitor"
            if each.monitor not in model.VALIDATION:
                problems.append(Problem(path, each.monitor, "is not a metric that a validation logs", model.VALIDATION))
            elif not data.val_samples:
                problems.append(Problem(path, each.monitor, "is never logged, because data.val_samples=0"))
    return problems
