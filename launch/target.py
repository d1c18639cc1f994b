"""The GPU for which a run is planned: the one that is named, or that the executor gives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from fiddlehead.launch.executor import Executor
from fiddlehead.launch.fitting import GPU
from fiddlehead.recipe import Recipe

if TYPE_CHECKING:
    from fiddlehead.attention import Target
    from fiddlehead.plan.cards import Card


def card_of(executor: Executor | None, recipe: Recipe) -> Card | None:
    """The GPU that the executor gives, of several kinds the largest; None if that is not known.

    It is without kernels: which serve depends on the packages that are there.
    """
    if executor is None or not executor.ships_code or recipe.trainer.accelerator not in GPU:
        return None
    from fiddlehead.plan.cards import Card

    cards = [Card.called(name) for name in executor.gpu_types()]
    known = [card for card in cards if card is not None]
    if not known or len(known) < len(cards):
        return None
    return replace(max(known, key=lambda card: card.gib), model="")


def target_of(target: Target | Card | str | None) -> Target | Card | Literal["unknown"] | None:
    """The target, where a text is the name of a GPU, or "unknown"."""
    if not isinstance(target, str) or target == "unknown":
        return target  # type: ignore[return-value]
    from fiddlehead.plan.cards import Card

    return Card.parse(target)
