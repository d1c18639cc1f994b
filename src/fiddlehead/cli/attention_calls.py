"""The attention calls of a recipe, on a machine that may not have the recipe's devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fiddlehead.errors import ConfigError, Problem

if TYPE_CHECKING:
    from fiddlehead.plan.attention_calls import Calls
    from fiddlehead.recipe import Recipe


@dataclass(frozen=True)
class _Trainer:
    """The part of a trainer that can be built on a machine without its devices."""

    strategy: Any


def _parts(model: Any, data: Any, trainer: Any) -> None:
    """The parts of a training that decide its attention calls."""


def calls_of_recipe(recipe: Recipe) -> Calls:
    """The attention calls of a recipe's training. Nothing starts, and only the shape of `init_from` is read.

    Raises:
        ConfigError: the recipe is not a training, or its parts do not fit together.
    """
    import fiddle as fdl

    from fiddlehead.plan.attention_calls import calls_of
    from fiddlehead.plan.problems import PRECISIONS
    from fiddlehead.recipe import Recipe
    from fiddlehead.training import LanguageModel, Parallel

    missing = [name for name in ("model", "data", "trainer") if name not in recipe.__arguments__]
    if missing:
        raise ConfigError(f"the recipe has no {' and no '.join(missing)}: it is not a training")
    precision = str(recipe.trainer.precision or "32-true")  # Lightning's default
    precision = {"32": "32-true", "bf16": "bf16-mixed"}.get(precision, precision)  # what it takes them for
    if precision not in PRECISIONS:
        raise ConfigError(Problem.unknown("trainer.precision", precision, "precision", PRECISIONS))
    trainer = fdl.Config(_Trainer, recipe.trainer.strategy)
    parts = Recipe(_parts, model=recipe.model, data=recipe.data, trainer=trainer).build_arguments()
    model, data, strategy = parts["model"], parts["data"], parts["trainer"].strategy
    if not isinstance(model, LanguageModel):
        raise ConfigError(Problem("model", message=f"is a {type(model).__name__}, not a LanguageModel"))
    try:
        if recipe.model.config is None:
            model.take_shape()
        # Attention does not see the vocabulary, which follows from the data.
        size, length = model.config.vocab_size or 1, model.config.seq_length or data.seq_length
        config = replace(model.config, vocab_size=size, seq_length=length)
        calls = calls_of(model, config, data, precision, strategy, deterministic=bool(recipe.trainer.deterministic))
    except ConfigError as error:
        raise error.under("model") from None
    if isinstance(strategy, Parallel) and (problems := strategy.problems(calls.config, data.seq_length)):
        raise ConfigError(*problems).under("trainer.strategy")
    return calls
