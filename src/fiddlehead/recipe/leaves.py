"""A configuration as a flat list of paths and values: what printing, comparing and tracing a recipe share."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import fiddle as fdl


@dataclass(frozen=True)
class Leaf:
    """One value of a configuration: `value` at `path`, set as the argument `key` of `owner`, or its default."""

    path: str
    value: Any
    owner: fdl.Buildable
    key: str | int
    is_default: bool = False


@dataclass(frozen=True)
class Called:
    """Stands for a nested configuration: what it calls; its arguments are leaves of their own."""

    kind: str
    function: Any


@dataclass(frozen=True)
class Shared:
    """Stands for a configuration that is also used at `path`, where its arguments are."""

    path: str


@dataclass(frozen=True)
class Container:
    """Stands for a list, tuple or dict that holds configurations; its items are leaves of their own."""

    kind: type
    length: int


def leaves(root: fdl.Buildable, *, defaults: bool = False) -> Iterator[Leaf]:
    """Every value under `root` in the order of the signatures, `root` itself first with the path ''.

    Containers without a configuration inside are one value. With `defaults`, arguments that are not set appear with
    their default.
    """
    first_path: dict[int, str] = {}

    def visit(value: Any, leaf: functools.partial[Leaf], path: str) -> Iterator[Leaf]:
        if isinstance(value, fdl.Buildable):
            if id(value) in first_path:
                yield leaf(path, Shared(first_path[id(value)]))
                return
            first_path[id(value)] = path
            yield leaf(path, Called(kind_of(value), fdl.get_callable(value)))
            for key, argument in fdl.ordered_arguments(value, include_defaults=defaults).items():
                of_argument = functools.partial(Leaf, owner=value, key=key, is_default=key not in value.__arguments__)
                yield from visit(argument, of_argument, join(path, key))
        elif holds_configuration(value):
            yield leaf(path, Container(type(value), len(value)))
            for key, item in items(value):
                yield from visit(item, leaf, f"{path}[{key}]")
        else:
            yield leaf(path, value)

    yield from visit(root, functools.partial(Leaf, owner=root, key=""), "")


def kind_of(buildable: fdl.Buildable) -> str:
    """The Fiddle class that `buildable` behaves as, whatever subclass of it was used."""
    return next(kind.__name__ for kind in (fdl.Partial, fdl.ArgFactory, fdl.Buildable) if isinstance(buildable, kind))


def join(path: str, key: str | int) -> str:
    """The path of the argument `key` of the configuration at `path`; positional arguments are in brackets."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def items(container: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of key (as written between the brackets of a path) and item of a list, tuple or dict."""
    if isinstance(container, dict):
        for key, item in container.items():
            yield (key if isinstance(key, str) and key.isidentifier() else repr(key)), item
    else:
        yield from enumerate(container)


def holds_configuration(value: Any) -> bool:
    """Whether `value` is a list, tuple or dict with a configuration somewhere inside."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return any(isinstance(item, fdl.Buildable) or holds_configuration(item) for item in value)


def same(left: Any, right: Any) -> bool:
    """Whether two leaves mean the same: 1, 1.0 and True differ, and a nan is like another nan."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return _same_keys(left, right) and all(same(item, right[key]) for key, item in left.items())
    if isinstance(left, (set, frozenset)):
        return _same_keys(left, right)
    if isinstance(left, functools.partial):
        return same((left.func, left.args, left.keywords), (right.func, right.args, right.keywords))
    try:
        return bool(left == right)
    except Exception:  # tensors and arrays compare elementwise and have no truth value
        return left is right


def _same_keys(left: Any, right: Any) -> bool:
    return {(type(key), key) for key in left} == {(type(key), key) for key in right}


def show(value: Any) -> str:
    """`value` as one would write it in Python, short."""
    match value:
        case Called():
            return f"{'' if value.kind == 'Buildable' else value.kind + ' '}{_name(value.function)}(...)"
        case Shared():
            return f"<shared with {value.path or 'the root'}>"
        case Container():
            return f"<{value.kind.__name__} of {value.length}>"
        case Enum():
            return f"{type(value).__name__}.{value.name}"
        case PurePath():
            return f"Path({str(value)!r})"
        case functools.partial():
            arguments = [show(value.func), *map(show, value.args)]
            arguments += [f"{key}={show(item)}" for key, item in value.keywords.items()]
            return f"partial({', '.join(arguments)})"
    if type(value) is list:
        return f"[{', '.join(map(show, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        return f"{{{', '.join(f'{show(key)}: {show(item)}' for key, item in value.items())}}}"
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__qualname__ if value.__module__ == "builtins" else f"{value.__module__}.{_name(value)}"
    return repr(value)


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or repr(function)
    return name.removeprefix("_VariableFunctionsClass.")  # torch.tanh and its like
