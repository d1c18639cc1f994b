"""Checks that the parts of a task have the attributes that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from fiddlehead.data.steps import StepDataModule
from fiddlehead.errors import Problem, refuse
from fiddlehead.training.language_model import LanguageModel
from fiddlehead.training.optim import Optim

DATA = (
    *("seq_length", "micro_batch_size", "global_batch_size", "val_samples", "separate_documents", "token_bytes"),
    *(
        "vocab_size",
        "tokenizer",
        "checksums",
        "missing",
        "known",
        "too_short",
        "missing_rows",
        "accumulate_grad_batches",
        "batch_indices",
    ),
)
"""The attributes of data that a task and its model need, besides Lightning's hooks."""
OPTIM = ("lr", "lr_scheduler", "kind", "build", "optimizer", "problems", "compiles", "state_bytes", "step_bytes")
"""The attributes of an optimizer that they need."""


def refuse_others(model: Any, data: Any, trainer: Any, optim: Any) -> None:
    """Raises one ConfigError for all parts that training cannot use, with the attributes that each lacks."""
    problems = []
    if not isinstance(model, LanguageModel):
        problems.append(Problem("model", message=f"is {_kind(model)}; must be a LanguageModel"))
    elif model.optim not in (None, optim):
        problems.append(Problem("model", message="has another optimizer than optim; give only one of them"))
    if not isinstance(trainer, Trainer):
        problems.append(Problem("trainer", message=f"is {_kind(trainer)}; must be Lightning's Trainer"))
    if not isinstance(data, LightningDataModule):
        message = f"is {_kind(data)}; must be a LightningDataModule derived from StepDataModule"
        problems.append(Problem("data", message=message))
    elif lacks := _lacks(data, StepDataModule, DATA):
        message = (
            f"is {_kind(data)}, which lacks {', '.join(lacks)}; derive it from fiddlehead.data.steps:StepDataModule"
        )
        problems.append(Problem("data", message=message))
    if lacks := _lacks(optim, Optim, OPTIM):
        message = f"is {_kind(optim)}, which lacks {', '.join(lacks)}; derive it from fiddlehead.training.optim:Optim"
        problems.append(Problem("optim", message=message))
    refuse(problems)


def _lacks(value: Any, base: type, names: Sequence[str]) -> list[str]:
    """The attributes that a part lacks, or inherits from a base that does not implement them."""
    kind = type(value)
    unwritten = [name for name in ("optimizer", "state_bytes", "missing_rows") if hasattr(base, name)]
    return [
        name
        for name in names
        # Not hasattr of the value, which would compute a property.
        if not (hasattr(kind, name) or name in getattr(value, "__dict__", {}))
        or (name in unwritten and getattr(kind, name, None) is getattr(base, name))
    ]


def _kind(value: Any) -> str:
    function = getattr(value, "func", None)  # of a partial
    if function is not None:
        return f"a partial of {getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"
