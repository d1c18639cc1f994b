"""`Recipe`, the complete configuration of a run: its edits, the catalogue of named ones, its YAML form, its types.

The names here are imported when they are first used: finding a recipe by its name does not need Fiddle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiddlehead.recipe.differences import MISSING, Difference, Differences
    from fiddlehead.recipe.recipe import Recipe

__all__ = ["MISSING", "Difference", "Differences", "Recipe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fiddlehead.recipe import differences, recipe

    return getattr(recipe if name == "Recipe" else differences, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
