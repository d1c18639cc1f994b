"""`search` and `fitted`: the layouts with which the GPUs of an executor can train a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.launch.built import built
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.fitting import fit_to_executor, missing_here, setting_problems
from fiddlehead.launch.target import card_of, target_of
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipe.edits import apply_overrides

if TYPE_CHECKING:
    from fiddlehead.plan.cards import Card
    from fiddlehead.plan.layouts import Layout


def search(recipe: Recipe, executor: Executor | None = None, *, target: Card | str | None = None) -> list[Layout]:
    """The layouts that fit with 5 % of the memory to spare, fastest first. Global batch and objective never change.

    Args:
        executor: where it runs; with a target, None means as many devices as the recipe has.
        target: the GPU that trains, or its name; None means the executor's, or this machine's.

    Raises:
        ConfigError: no layout fits, or nothing is known of the GPU or of the recipe.
    """
    from fiddlehead.plan.cards import CARDS
    from fiddlehead.plan.training import search_layouts

    refuse(setting_problems(recipe))
    card = target_of(target)
    fixed = recipe.clone() if card is not None and executor is None else fit_to_executor(recipe, executor)
    here = executor is None or not executor.ships_code
    card = card or card_of(executor, fixed)
    if card == "unknown" or (card is None and (not here or missing_here(fixed))):
        raise ConfigError(Problem("gpu", target, "the GPU that trains is not here; name it", CARDS))
    with built(fixed, card) as (parts, device):
        found = search_layouts(**parts, target=device)
    if not found:
        raise ConfigError("no layout fits; give more or larger GPUs, or a smaller model")
    return found


def fitted(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with a layout that `search` found."""
    return apply_overrides(recipe, layout.edits, find=catalog.find_part)
