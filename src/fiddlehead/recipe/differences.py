"""What differs between two recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fiddle as fdl

from fiddlehead import notebook
from fiddlehead.recipe.leaves import Leaf, leaves, same, show


class _Missing:
    def __repr__(self) -> str:
        return "<not set>"


MISSING = _Missing()
"""In a `Difference`: one of the recipes has no value at this path."""


@dataclass(frozen=True)
class Difference:
    """One difference of two recipes: the values at `path`, or `MISSING`."""

    path: str
    left: Any
    right: Any


class Differences(list[Difference]):
    """All differences of two recipes; prints as two columns."""

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{path:<{widths[0]}}  {left:<{widths[1]}}  {right}" for path, left, right in rows)

    def _repr_html_(self) -> str:
        return notebook.STYLE + notebook.table(("path", "left", "right"), self._rows())

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(difference.path or "(task)", show(difference.left), show(difference.right)) for difference in self]


def differences(left: fdl.Buildable, right: fdl.Buildable) -> Differences:
    """The paths where `right` has another value, lacks or adds a configuration, or shares one differently."""
    sides = _by_path(left), _by_path(right)
    found = []
    for path in dict.fromkeys((*sides[0], *sides[1])):
        pair = [side.get(path) for side in sides]
        if None in pair and all(leaf is None or leaf.is_default for leaf in pair):
            continue  # a default of something that only one side has
        values = [leaf.value if leaf else MISSING for leaf in pair]
        if not same(*values):
            found.append(Difference(path, *values))
    return Differences(found)


def _by_path(recipe: fdl.Buildable) -> dict[str, Leaf]:
    return {leaf.path: leaf for leaf in leaves(recipe, defaults=True)}
