"""What kind of thing may stand where, as annotations say."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import fiddle as fdl

from fiddlehead.errors import ConfigError
from fiddlehead.recipe.coercion import describe
from fiddlehead.recipe.hints import Unevaluated
from fiddlehead.recipe.leaves import show


def check_kind(value: Any, hint: Any, is_free: Callable[[Any], bool] = lambda _: False) -> None:
    """Refuses a class, a function or a configuration, or one within a list or dict, that is not of the type `hint`.

    Numbers, texts and other plain values are left to what they are given to.

    Args:
        is_free: whether a class or function may stand anywhere.

    Raises:
        ConfigError: with what the annotation asks for.
    """
    kinds = members(hint)
    if not kinds or not _names_something(value):
        return
    if isinstance(value, (list, tuple, set, dict)):
        if not any(_is_instance(value, kind) for kind in kinds):
            raise ConfigError(f"expects {describe(hint)}, not a {type(value).__name__}")
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            check_kind(item, item_hint(hint, value, key), is_free)
        return
    function = fdl.get_callable(value) if isinstance(value, fdl.Buildable) else getattr(value, "func", value)
    if is_free(function):
        return
    if isinstance(value, fdl.Config):
        made = function if inspect.isclass(function) else _returned(function)
        if made is not None and not any(_makes(made, kind) for kind in kinds):
            raise ConfigError(f"expects {describe(hint)}, not a configuration of {function.__qualname__}")
    elif not any(_takes(value, kind) for kind in kinds):
        raise ConfigError(f"expects {describe(hint)}, not {show(function)}")


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, without None; of another type only itself, of one that says nothing none."""
    if isinstance(hint, typing.NewType):
        return members(hint.__supertype__)
    if hint in (Any, object) or isinstance(hint, (Unevaluated, typing.TypeVar, typing.ForwardRef, str)):
        return ()
    if typing.get_origin(hint) is typing.Annotated:
        return members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        within = [members(member) for member in typing.get_args(hint) if member is not type(None)]
        return tuple(kind for kinds in within for kind in kinds) if all(within) else ()
    return (hint,)


def item_hint(hint: Any, container: Any, key: Any) -> Any:
    """The type of the member `key` of a `container` whose own type is `hint`."""
    for member in members(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if not inspect.isclass(origin) or not isinstance(container, origin) or not arguments:
            continue
        if isinstance(container, dict):
            return arguments[1]
        if origin is tuple and arguments[-1] is not Ellipsis:
            return arguments[key] if key < len(arguments) else Any
        return arguments[0]
    return Any


def _names_something(value: Any) -> bool:
    """Whether `value` is a class, a function or a configuration, or a container with one inside."""
    if isinstance(value, dict):
        return any(map(_names_something, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(_names_something, value))
    return isinstance(value, (fdl.Buildable, functools.partial)) or inspect.isclass(value) or inspect.isroutine(value)


def _is_instance(container: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return inspect.isclass(origin) and isinstance(container, origin)


def _returned(function: Any) -> type | None:
    """The class that a function says it returns; None if it says nothing of the kind."""
    try:
        hint = typing.get_type_hints(function).get("return")
    except Exception:  # whatever evaluating somebody's annotations may raise
        return None
    origin = typing.get_origin(hint) or hint
    return origin if inspect.isclass(origin) else None


def _makes(made: type, kind: Any) -> bool:
    """Whether an instance of `made` is a `kind`."""
    origin = typing.get_origin(kind) or kind
    if origin is collections.abc.Callable:
        return issubclass(made, collections.abc.Callable)
    if not inspect.isclass(origin):
        return False
    if getattr(origin, "_is_protocol", False) and not getattr(origin, "_is_runtime_protocol", False):
        # Attributes may be set by the constructor, but methods are there.
        public = [(name, each) for base in origin.__mro__ for name, each in vars(base).items() if _is_public(name)]
        has = {name for base in made.__mro__ for name in vars(base)}  # hasattr finds the metaclass's `__call__` too
        return all(name in has for name, each in public if inspect.isfunction(each))
    try:
        return issubclass(made, origin) or issubclass(origin, fdl.Buildable)
    except TypeError:  # a protocol that has more than methods
        return True


def _is_public(name: str) -> bool:
    return name == "__call__" or not name.startswith("_")


def _takes(value: Any, kind: Any) -> bool:
    """Whether a class or function, or a Partial, can stand itself where a `kind` is expected."""
    origin = typing.get_origin(kind) or kind
    if origin is type:
        bound = (typing.get_args(kind) or (object,))[0]
        bound = typing.get_origin(bound) or bound
        return inspect.isclass(value) and (not inspect.isclass(bound) or issubclass(value, bound))
    if origin is collections.abc.Callable:
        return True
    return inspect.isclass(origin) and isinstance(value, fdl.Buildable) and issubclass(origin, fdl.Buildable)
