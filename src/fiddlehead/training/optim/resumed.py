"""The settings of a resumed run's optimizer: those of the recipe, where PyTorch restores those of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from fiddlehead.training.optim.optim import Optim

Settings = Sequence[dict[str, Any]]
"""Of each group of an optimizer."""


def settings_of(optimizer: Optimizer, optim: Optim) -> Settings:
    """The settings by the recipe of a new optimizer's groups; an optimizer may keep some of its state there, too."""
    named = {"initial_lr", *vars(optim)} - {"lr"}
    return [{name: value for name, value in group.items() if name in named} for group in optimizer.param_groups]


def resume_with(settings: Settings, schedule: Any) -> None:
    """Gives a schedule's optimizer these settings again, and the learning rate that the schedule now has.

    A resumed run may have another length than before. One that starts from another run's checkpoint may also have
    another rate, weight decay and so on.

    Args:
        settings: of `settings_of`; empty for an optimizer that a user builds.
    """
    groups = schedule.optimizer.param_groups
    for group, of_recipe in zip(groups, settings, strict=False):
        group.update(of_recipe)
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)
