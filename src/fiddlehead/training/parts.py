"""What a task asks of the parts that it is given, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from fiddlehead.data.steps import StepDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.training.language_model import LanguageModel
from fiddlehead.training.optim import Optim

DATA = (
    *("seq_length", "micro_batch_size", "global_batch_size", "val_samples", "separate_documents", "token_bytes"),
    *(
        "vocab_size",
        "tokenizer",
        "checksums",
        "missing",
        "too_short",
        "missing_rows",
        "accumulate_grad_batches",
        "batch_indices",
    ),
)
"""What a task and its model ask of data, beside Lightning's hooks."""
OPTIM = ("lr", "lr_scheduler", "kind", "build", "optimizer", "problems", "compiles", "state_bytes")
"""What they ask of an optimizer's settings."""


def refuse_others(model: Any, data: Any, trainer: Any, optim: Any) -> None:
    """Raises one ConfigError for all parts that are not what a training needs, with the names that each lacks."""
    problems = []
    if not isinstance(model, LanguageModel):
        problems.append(f"model: is {_kind(model)}; allowed: a LanguageModel, or a class derived from it")
    if not isinstance(trainer, Trainer):
        problems.append(f"trainer: is {_kind(trainer)}; allowed: Lightning's Trainer")
    if not isinstance(data, LightningDataModule):
        problems.append(f"data: is {_kind(data)}; allowed: a LightningDataModule, derived from StepDataModule")
    elif lacks := _lacks(data, StepDataModule, DATA):
        problems.append(
            f"data: is {_kind(data)}, which lacks {', '.join(lacks)}; allowed: a class derived from "
            "fiddlehead.data.steps:StepDataModule"
        )
    if lacks := _lacks(optim, Optim, OPTIM):
        problems.append(
            f"optim: is {_kind(optim)}, which lacks {', '.join(lacks)}; allowed: AdamW, Muon, or a class derived from "
            "fiddlehead.training.optim:Optim"
        )
    if problems:
        raise ConfigError(*problems)


def _lacks(value: Any, base: type, names: Sequence[str]) -> list[str]:
    """The names that a part has not, or only as the base that leaves them to others."""
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
