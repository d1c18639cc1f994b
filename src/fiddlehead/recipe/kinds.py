"""Decides which classes, functions and configurations fit an annotated type."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any

import fiddle as fdl

from fiddlehead.errors import ConfigError
from fiddlehead.recipe.hints import describe, item_hint, members
from fiddlehead.recipe.leaves import holds, show
from fiddlehead.recipe.literals import Bare


class MismatchError(ConfigError):
    """A value does not have the expected type, which the message names."""

    def __init__(self, given: Any, hint: Any, advice: str = "") -> None:
        self.given, self.advice = given, advice
        super().__init__(f"expects {describe(hint)}, not {_shown(given)}{advice and '; ' + advice}")


def check_kind(value: Any, hint: Any, is_free: Callable[[Any], bool] = lambda _: False) -> None:
    """Refuses a class, a function or a configuration, or one within a list or dict, that is not of the type `hint`.

    Plain values, such as numbers and texts, are not checked here: the class or function that takes them does that.

    Args:
        is_free: whether a class or function may stand anywhere.

    Raises:
        MismatchError: with what the annotation asks for.
    """
    kinds = members(hint)
    if is_named(value):
        if kinds and not is_free(_function(value)) and not any(_fits(value, kind) for kind in kinds):
            raise MismatchError(value, hint)
    elif kinds and isinstance(value, (list, tuple, set, dict)) and holds(value, is_named):
        origins = [typing.get_origin(kind) or kind for kind in kinds]
        if not any(inspect.isclass(origin) and isinstance(value, origin) for origin in origins):
            raise MismatchError(value, hint)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_kind(item, item_hint(hint, value, key), is_free)


def is_named(value: Any) -> bool:
    """Whether `value` is a class or a function, or calls one: a configuration, a `functools.partial`."""
    return isinstance(value, (fdl.Buildable, functools.partial)) or inspect.isclass(value) or inspect.isroutine(value)


def is_part(kind: Any) -> bool:
    """Whether a type is a class that a recipe configures, and not one of Python's own."""
    origin = typing.get_origin(kind) or kind
    return inspect.isclass(origin) and origin.__module__.partition(".")[0] not in sys.stdlib_module_names


def _function(value: Any) -> Any:
    """The class or function that a named value is or calls."""
    return fdl.get_callable(value) if isinstance(value, fdl.Buildable) else getattr(value, "func", value)


def _shown(given: Any) -> str:
    """What was given, as it was typed."""
    if isinstance(given, Bare):
        return f"'{given}'" if given else "nothing"
    if isinstance(given, fdl.Config):
        return f"a configuration of {fdl.get_callable(given).__qualname__}"
    if is_named(given):
        return show(_function(given))
    return f"a {type(given).__name__}" if holds(given, is_named) else show(given)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a named value fits a `kind`: itself, or the object that it builds."""
    origin = typing.get_origin(kind) or kind
    if isinstance(value, fdl.Config):
        function = fdl.get_callable(value)
        made = function if inspect.isclass(function) else _returned(function)
        return made is None or _makes(made, origin)
    if origin is type:
        bound = (typing.get_args(kind) or (object,))[0]
        bound = typing.get_origin(bound) or bound
        return inspect.isclass(value) and (not inspect.isclass(bound) or issubclass(value, bound))
    if origin is collections.abc.Callable:
        return True
    return inspect.isclass(origin) and isinstance(value, fdl.Buildable) and issubclass(origin, fdl.Buildable)


def _returned(function: Any) -> type | None:
    """The class that a function says it returns; None if it does not say."""
    try:
        hint = typing.get_type_hints(function).get("return")
    except Exception:  # whatever evaluating somebody's annotations may raise
        return None
    origin = typing.get_origin(hint) or hint
    return origin if inspect.isclass(origin) else None


def _makes(made: type, kind: Any) -> bool:
    """Whether an instance of `made` is a `kind`."""
    if kind is collections.abc.Callable:
        return issubclass(made, collections.abc.Callable)
    if not inspect.isclass(kind):
        return False
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        # Only methods count: attributes may be set by the constructor. Not hasattr, which finds the metaclass's
        # `__call__` too.
        asked = {name for base in kind.__mro__ for name, each in vars(base).items() if inspect.isfunction(each)}
        public = {name for name in asked if name == "__call__" or not name.startswith("_")}
        return public <= {name for base in made.__mro__ for name in vars(base)}
    try:
        return issubclass(made, kind) or issubclass(kind, fdl.Buildable)
    except TypeError:  # a protocol that has more than methods
        return True
