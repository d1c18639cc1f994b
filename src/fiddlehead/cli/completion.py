"""What a shell offers for TAB: recipes, edits' paths, their values, runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer

from fiddlehead.recipe import catalog
from fiddlehead.run.names import list_runs

Offer = tuple[str, str]
"""A word, and what it means."""

OF_RUNS = ("log.name", "resume", "model.init_from")
"""Fields that take the name of a run."""


def complete_recipe(incomplete: str) -> list[Offer]:
    """Names of recipes."""
    return _beginning(incomplete, ((entry.name, entry.summary) for entry in catalog.recipes()))


def complete_run(incomplete: str) -> list[Offer]:
    """Names of runs."""
    return _beginning(incomplete, ((run.name, "") for run in list_runs()))


def complete_field(incomplete: str) -> list[Offer]:
    """Paths of fields."""
    return _beginning(incomplete, ((path, doc) for path, doc, _ in _paths([])))


def complete_words(context: typer.Context, incomplete: str) -> list[Offer]:
    """A recipe if none was named, then edits: `trainer.max_steps=`, and after the = a value."""
    words = [str(word) for word in context.params.get("words") or ()]
    if not words and not context.params.get("factory"):
        return complete_recipe(incomplete)
    # Bash makes three words of path=value, and replaces only the last of them.
    if incomplete == "=" and words:
        return _values(words[-1], words)
    if len(words) > 1 and words[-1] == "=":
        return _beginning(incomplete, _values(words[-2], words))
    path, equals, value = incomplete.partition("=")
    if equals:
        return [(f"{path}={offer}", doc) for offer, doc in _beginning(value, _values(path, words))]
    # With its default a path is never the only offer, after which a shell would add a space.
    offers: list[Offer] = []
    for name, doc, default in _paths(words):
        offers += [(f"{name}=", doc), *([(f"{name}={default}", doc)] if default else [])]
    return _beginning(incomplete, offers)


def _paths(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """The path, the first sentence and the default of each field."""
    from fiddlehead.recipe.fields import EXECUTOR, known_fields

    executor = _executor(words)
    found = {EXECUTOR: ("Where it runs.", "local")}
    for each in known_fields():
        if not each.path.startswith(f"{EXECUTOR}.") or executor in ("", each.owner):
            found.setdefault(each.path, (each.doc.partition(". ")[0], each.default.strip("'")))
    return [(path, *rest) for path, rest in found.items()]


def _values(path: str, words: Sequence[str]) -> list[Offer]:
    """The values that a field may have, as far as they can be listed."""
    from fiddlehead.recipe.fields import EXECUTOR, known_fields

    if path == EXECUTOR:
        return [(entry.name, entry.summary) for entry in catalog.executors()]
    found: dict[str, str] = {}
    for each in known_fields():
        if each.path == path:
            values = [*each.allowed, *each.parts, *([each.default.strip("'")] if each.default else [])]
            found |= {value: "the default" if value == each.default.strip("'") else "" for value in values}
    if path in OF_RUNS:
        found |= {run.name: "a run" for run in list_runs()}
    return list(found.items())


def _executor(words: Sequence[str]) -> str:
    """The executor that `executor=NAME` names; "" if there is none."""
    joined = " ".join(words).replace(" = ", "=").split()
    return next((word.partition("=")[2].partition("(")[0] for word in joined if word.startswith("executor=")), "")


def _beginning(incomplete: str, offers: Iterable[Offer]) -> list[Offer]:
    return [(word, doc) for word, doc in offers if word.startswith(incomplete)]
