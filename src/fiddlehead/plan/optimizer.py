"""The optimizer of a run, and the course of its learning rate."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any

from lightning.pytorch import Trainer

from fiddlehead.numbers import is_number, rate
from fiddlehead.training.optim import Optim, course

_SAID_APART = ("lr", "lr_scheduler", "weight_decay")


@dataclass(frozen=True)
class OptimizerPlan:
    """The optimizer of a run, and its schedule."""

    kind: str
    lr: float
    """At its peak."""
    min_lr: float
    """At the end."""
    warmup_steps: int
    schedule: str
    """The name of the schedule's class."""
    course: str
    """The rate over the run in one line."""
    weight_decay: float | None
    gradient_clip_val: float | None
    """The norm to which gradients are clipped; None: they are not."""
    settings: dict[str, Any]
    """The other settings that differ from the optimizer's defaults."""

    def lines(self) -> list[str]:
        """The optimizer in sentences for a summary."""
        about = [self.kind]
        if self.weight_decay is not None:
            about.append(f"weight decay {self.weight_decay:g}" if self.weight_decay else "no weight decay")
        about += [f"{name} {_said(value)}" for name, value in self.settings.items()]
        clip = self.gradient_clip_val
        about.append(f"gradients clipped to norm {clip:g}" if clip else "gradients not clipped")
        return [", ".join(about), f"learning rate {self.course}"]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def optimizer_plan(optim: Optim, trainer: Trainer) -> OptimizerPlan:
    """The optimizer of a run of `trainer.max_steps`."""
    schedule = optim.lr_scheduler
    clip = trainer.gradient_clip_val
    return OptimizerPlan(
        kind=optim.kind,
        lr=optim.lr,
        min_lr=schedule.min_lr,
        warmup_steps=schedule.warmup_steps,
        schedule=type(schedule).__name__,
        course=course(schedule, int(trainer.max_steps), optim.lr),
        weight_decay=getattr(optim, "weight_decay", None),
        gradient_clip_val=float(clip) if clip else None,
        settings=_changed(optim),
    )


def _changed(optim: Any) -> dict[str, Any]:
    """The settings that are not the defaults of the optimizer's class."""
    if not is_dataclass(optim):
        return {}
    defaults = {each.name: each.default for each in fields(optim) if each.name not in _SAID_APART}
    values = {name: getattr(optim, name) for name in defaults}
    return {
        name: value if isinstance(value, bool | int | float | str | tuple | None) else str(value)
        for name, value in values.items()
        if defaults[name] is not MISSING and value != defaults[name]
    }


def _said(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " and ".join(map(_said, value))
    return rate(value) if is_number(value) else str(value)
