"""A configuration as a flat list of paths and values, for printing, comparing and tracing a recipe."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import fiddle as fdl

from fiddlehead.numbers import plain


@dataclass(frozen=True)
class Leaf:
    """One value of a configuration: `value` at `path`, set as the argument `key` of `owner`, or its default."""

    path: str
    value: Any
    owner: fdl.Buildable
    key: str | int
    is_default: bool = False


@dataclass(frozen=True)
class Nested:
    """Stands for a value whose parts are leaves of their own: a configuration, or a container that holds one.

    Two are equal if they read the same and are of the same class or function.
    """

    text: str
    kind: Any = None


def leaves(root: fdl.Buildable, *, defaults: bool = False) -> Iterator[Leaf]:
    """Every value under `root` in the order of the signatures, `root` itself first with the path ''.

    Containers without a configuration inside are one value. With `defaults`, arguments that are not set appear with
    their default.
    """
    first_path: dict[int, str] = {}

    def visit(value: Any, leaf: functools.partial[Leaf], path: str) -> Iterator[Leaf]:
        if isinstance(value, fdl.Buildable):
            if id(value) in first_path:
                yield leaf(path, Nested(f"<shared with {first_path[id(value)] or 'the root'}>"))
                return
            first_path[id(value)] = path
            function = fdl.get_callable(value)
            kind = next((f"{each.__name__} " for each in (fdl.Partial, fdl.ArgFactory) if isinstance(value, each)), "")
            yield leaf(path, Nested(f"{kind}{name_of(function)}(...)", function))
            for key, argument in fdl.ordered_arguments(value, include_defaults=defaults).items():
                of_argument = functools.partial(Leaf, owner=value, key=key, is_default=key not in value.__arguments__)
                yield from visit(argument, of_argument, join(path, key))
        elif holds_configuration(value):
            yield leaf(path, Nested(f"<{type(value).__name__} of {len(value)}>", type(value)))
            for key, item in items(value):
                yield from visit(item, leaf, f"{path}[{key}]")
        else:
            yield leaf(path, value)

    yield from visit(root, functools.partial(Leaf, owner=root, key=""), "")


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


def holds(value: Any, wanted: Callable[[Any], bool]) -> bool:
    """Whether `value` is a list, tuple, set or dict with something `wanted` inside, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple, set)) and any(wanted(item) or holds(item, wanted) for item in value)


def holds_configuration(value: Any) -> bool:
    """Whether `value` is a container with a configuration inside."""
    return holds(value, lambda item: isinstance(item, fdl.Buildable))


def same(left: Any, right: Any) -> bool:
    """Whether two leaves are equal: 1, 1.0 and True are not, and two nans are."""
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
    """`value` as one would write it in Python, in short."""
    match value:
        case Nested():
            return value.text
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
        return value.__qualname__ if value.__module__ == "builtins" else f"{value.__module__}.{name_of(value)}"
    return plain(value) if type(value) is float else repr(value)


def name_of(function: Any) -> str:
    """The name of a class or function without its module."""
    name = getattr(function, "__qualname__", None) or repr(function)
    return name.removeprefix("_VariableFunctionsClass.")  # torch.tanh and its like
