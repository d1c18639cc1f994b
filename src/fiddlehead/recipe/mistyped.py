"""Finds the values of a recipe that do not have the types which its parts ask for, as the command line does."""

from __future__ import annotations

import functools
import inspect
from pathlib import PurePath
from typing import Any

import fiddle as fdl
from fiddle import daglish

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe.allowed import is_listed
from fiddlehead.recipe.coercion import check_type
from fiddlehead.recipe.hints import argument_hint, describe
from fiddlehead.recipe.leaves import join, name_of


def mistyped(recipe: fdl.Buildable) -> list[Problem]:
    """A problem for each argument that was set to a value of another type than its annotation asks for.

    The parts that a user wrote are not asked: what they take is theirs to say.
    """
    problems, task = list[Problem](), fdl.get_callable(recipe)
    for config, place in daglish.iterate(recipe):
        if not isinstance(config, fdl.Buildable):
            continue
        function = fdl.get_callable(config)
        if not is_listed(function, task=function is task):
            continue
        path = daglish.path_str(place).removeprefix(".")
        for key, value in fdl.ordered_arguments(config).items():
            hint = argument_hint(config, key)
            if not _fits(value, hint):
                problems.append(_problem(join(path, key), value, hint))
    return problems


def _fits(value: Any, hint: Any) -> bool:
    bare = _bare(value)
    try:
        # A part that a user wrote may stand anywhere, but its class alone is built by nobody.
        check_type(_plain(value), hint, is_free=lambda each: not is_listed(each) and each not in bare)
    except ConfigError:
        return False
    return True


def _problem(path: str, value: Any, hint: Any) -> Problem:
    expected = f"expects {describe(hint)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return Problem(path, value, expected)
    if unbuilt := next(filter(inspect.isclass, _bare(value)), None):
        return Problem(path, message=f"{expected}; write fdl.Config({unbuilt.__qualname__}) instead of the class")
    if isinstance(value, (fdl.Partial, functools.partial)):
        function = fdl.get_callable(value) if isinstance(value, fdl.Partial) else value.func
        return Problem(path, message=f"{expected}, not a partial; write fdl.Config({name_of(function)}, ...)")
    if isinstance(value, fdl.Config):
        return Problem(path, message=f"{expected}, not a configuration of {name_of(fdl.get_callable(value))}")
    return Problem(path, message=f"{expected}, not a {type(value).__name__}")


def _bare(value: Any) -> list[Any]:
    """The classes and functions in a value, which are not configured."""
    return [each for each in _all(value) if inspect.isclass(each) or inspect.isroutine(each)]


def _all(value: Any) -> list[Any]:
    """A value, or the members of a list or dict, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    return [each for item in value for each in _all(item)] if isinstance(value, (list, tuple, set)) else [value]


def _plain(value: Any) -> Any:
    """A value with the texts of its paths: where a text is asked for, a path is one."""
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return {key: _plain(item) for key, item in value.items()} if type(value) is dict else value
