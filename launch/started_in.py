"""The folder in which a run was launched: the relative paths in its recipe are paths from there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, get_args

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import read_object
from fiddlehead.files.paths import user_path, working_directory
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.hints import argument_hint
from fiddlehead.recipe.leaves import leaves
from fiddlehead.run import RunDirectory


def refuse_elsewhere(run: RunDirectory, recipe: Recipe) -> None:
    """Raises ConfigError if a path in a run's recipe is relative, and the run was launched in another folder.

    Where that folder is not known, or is not there any more, it only warns.
    """
    relative = dict(_relative_paths(recipe))
    here = working_directory()
    folder = _launched_in(run)
    if not relative or (folder is not None and folder.is_dir() and folder.samefile(here)):
        return
    if folder is not None and folder.is_dir():
        message = f"is relative to {folder}, where {run.name!r} was launched; go there first: cd {quote(str(folder))}"
        raise ConfigError(*(Problem(path, value, message) for path, value in relative.items()))
    which = ", ".join(f"{path}={value!r}" for path, value in relative.items())
    where = "where it was launched is not known" if folder is None else f"{folder}, where it was launched, is gone"
    print(f"WARNING: {which} of {run.name!r}: {where}, so they are taken from {here}")  # noqa: T201


def _launched_in(run: RunDirectory) -> Path | None:
    with contextlib.suppress(ConfigError):  # it is damaged, or a run that was copied has none
        folder = read_object(run.environment).get("launched_in")
        return Path(folder) if isinstance(folder, str) and "\0" not in folder else None
    return None


def _relative_paths(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """The values of a recipe that are relative paths, or have one in them, by where they are in the recipe."""
    for leaf in leaves(recipe):
        if leaf.path == "resume" and leaf.value in ("auto", "never"):
            continue
        if (
            leaf.path
            and _takes_paths(argument_hint(leaf.owner, leaf.key))
            and any(map(_is_relative, _texts(leaf.value)))
        ):
            yield leaf.path, leaf.value


def _takes_paths(hint: Any) -> bool:
    return hint is Path or any(map(_takes_paths, get_args(hint)))


def _texts(value: Any) -> Iterator[str | Path]:
    if isinstance(value, str | Path):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _texts(item))


def _is_relative(path: str | Path) -> bool:
    try:
        float(str(path))  # the weight of a dataset in a blend
    except (TypeError, ValueError):
        return not user_path(path).is_absolute()
    return False
