"""Builds the arguments of a recipe's task, and collects what is wrong with all of them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from typing import Any

import fiddle as fdl
from fiddle import daglish

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.recipe.from_task import names_from_task
from fiddlehead.recipe.leaves import join, name_of


def build_arguments(recipe: fdl.Partial) -> dict[str, Any]:
    """As `Recipe.build_arguments`."""
    builder = _Builder()
    arguments = daglish.MemoizedTraversal.run(builder.build, recipe)
    refuse(builder.problems, builder.cause)
    return arguments


class _Failed:
    """A placeholder for an object that could not be built."""


class _Builder:
    """Builds a configuration bottom up, and collects the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.cause: Exception | None = None

    def build(self, value: Any, state: daglish.State) -> Any:
        if not state.is_traversable(value):
            return value
        children = state.flattened_map_children(value)
        failed = any(child is _Failed for child in children.values)
        if not isinstance(value, fdl.Buildable):
            return _Failed if failed else children.unflatten()
        path = _path_str(state.current_path)
        is_root = not state.current_path
        name = name_of(fdl.get_callable(value))
        if is_root or not isinstance(value, (fdl.Partial, fdl.ArgFactory)):
            given = fdl.ordered_arguments(value, include_unset=True, include_defaults=True)
            missing = [key for key, argument in given.items() if argument is fdl.NO_VALUE]
            said = f"is required by {name} and not set"
            self.problems += [Problem(join(path, key), message=said) for key in missing]
            failed = failed or bool(missing)
        if failed:
            return _Failed
        arguments = children.metadata.arguments(children.values)
        if is_root:
            return arguments
        positional, by_name = value.__signature_info__.transform_to_args_kwargs(arguments)
        try:
            return value.__build__(*positional, **by_name, **self._from_task(value, state))
        except ConfigError as error:
            self._note(error, error.under(path).problems)
        except Exception as error:
            # Any other exception than those for a wrong value is a bug, and passes through.
            if not isinstance(error, (ValueError, TypeError)) and not _is_lightnings(error):
                raise
            self._note(error, [Problem(path, message=f"{name}: {error}")])
        return _Failed

    def _from_task(self, part: fdl.Buildable, state: daglish.State) -> dict[str, Any]:
        """The task's arguments that the constructor of `part` takes, if it is itself an argument of the task."""
        if state.parent is None or state.parent.current_path:
            return {}
        given = fdl.ordered_arguments(state.parent.original_value)
        names = [name for name in names_from_task(fdl.get_callable(part)) if name in given]
        built = {name: state.parent.call(given[name], daglish.Attr(name)) for name in names}
        return {name: argument for name, argument in built.items() if argument is not _Failed}

    def _note(self, error: Exception, problems: Sequence[str]) -> None:
        self.problems += problems
        self.cause = self.cause or error


def _is_lightnings(error: Exception) -> bool:
    """Whether it is what Lightning raises for wrong values: an exception of its own, or a RuntimeError."""
    if type(error).__name__ == "MisconfigurationException":
        return True
    *_, (raised_in, _) = traceback.walk_tb(error.__traceback__)
    return type(error) is RuntimeError and str(raised_in.f_globals.get("__name__")).startswith("lightning.")


def _path_str(path: daglish.Path) -> str:
    """As `leaves` writes it: ``data.sources[train][0]``."""
    return re.sub(r"\['([^\W\d]\w*)'\]", r"[\1]", daglish.path_str(path)).removeprefix(".")
