"""Reads types from annotations: of a parameter, of an argument, of a member of a container."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from enum import Enum
from typing import Any

import fiddle as fdl

from fiddlehead.recipe.leaves import show
from fiddlehead.recipe.resumable import unmarked


@dataclasses.dataclass(frozen=True)
class Unevaluated:
    """Stands for an annotation that names something only a type checker knows."""

    text: str


def parameter_hint(function: Any, name: str) -> Any:
    """The type of the parameter `name` of a class or function; `Any` if there is none.

    ``x: int = None`` counts as ``int | None``.
    """
    hint = unmarked(written_hint(function, name))
    if _signature(function).parameters[name].default is None and hint is not Any and not isinstance(hint, Unevaluated):
        hint = typing.Optional[hint]  # noqa: UP045  | fails for annotations that are not types
    return hint


def written_hint(function: Any, name: str) -> Any:
    """The annotation of the parameter `name` of a class or function, as it is written; `Any` if there is none.

    Annotations that are strings are evaluated. One that cannot be is `Unevaluated`.
    """
    hint = _signature(function).parameters[name].annotation
    hint = Any if hint is inspect.Parameter.empty else hint
    for owner in _annotated(function):
        annotations = inspect.get_annotations(owner)
        if name in annotations:
            hint = _evaluated(annotations[name], owner)
            break
    if isinstance(hint, (str, list, dict, set)):  # a text, or something that is not a type
        hint = Unevaluated(str(hint))
    return hint.type if isinstance(hint, dataclasses.InitVar) else hint


def argument_hint(config: fdl.Buildable, key: str | int) -> Any:
    """The type of the argument `key` of a configuration, which may be one of ``*args`` or ``**kwargs``."""
    info = config.__signature_info__
    if isinstance(key, int):
        start = info.var_positional_start
        name = list(info.parameters)[key if start is None else min(key, start)]
    else:
        name = key if key in info.parameters else info.var_keyword_name
    return parameter_hint(fdl.get_callable(config), name) if name else Any


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


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, without None. Another type has itself; a type that allows anything has none."""
    if isinstance(hint, typing.NewType):
        return members(hint.__supertype__)
    if hint in (Any, object) or isinstance(hint, (Unevaluated, typing.TypeVar, typing.ForwardRef, str)):
        return ()
    if typing.get_origin(hint) is typing.Annotated:
        return members(typing.get_args(hint)[0])
    if is_union(hint):
        within = [members(member) for member in typing.get_args(hint) if member is not type(None)]
        return tuple(kind for kinds in within for kind in kinds) if all(within) else ()
    return (dict[str, Any] if typing.is_typeddict(hint) else hint,)


def choices(kind: Any) -> list[Any]:
    """The values of a type that has few: of a Literal, or the names of an Enum; empty for another type."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return list(kind.__members__)
    return list(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else []


def is_union(hint: Any) -> bool:
    """Whether a type is ``A | B`` or ``Optional[A]``."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def describe(hint: Any) -> str:
    """A type as one would write it in an annotation."""
    if isinstance(hint, Unevaluated):
        return hint.text
    arguments = typing.get_args(hint)
    if is_union(hint):
        return " | ".join(dict.fromkeys(map(describe, arguments)))
    match typing.get_origin(hint):
        case typing.Literal:
            return " | ".join(map(show, arguments))
        case typing.Annotated:
            return describe(arguments[0])
    if hint in (None, type(None)):
        return "None"
    if isinstance(hint, type) and not arguments:
        return f"one of {', '.join(hint.__members__)}" if issubclass(hint, Enum) else hint.__name__
    return re.sub(r"\b(typing|collections\.abc)\.", "", str(hint))


def _signature(function: Any) -> inspect.Signature:
    function = typing.get_origin(function) or function
    # Kept, because it is asked for once for each parameter; other callables may be equal and differ in it.
    known = isinstance(function, (type, types.FunctionType))
    return _known_signature(function) if known else inspect.signature(function)


_known_signature = functools.lru_cache(maxsize=256)(inspect.signature)


def _annotated(function: Any) -> list[Any]:
    """The objects whose annotations describe the parameters of `function`; the first one that has a name decides."""
    function = typing.get_origin(function) or function
    if not isinstance(function, type):
        return [inspect.unwrap(function)]
    constructors = [function.__init__, function.__new__]
    written = [inspect.unwrap(constructor) for constructor in constructors if inspect.isfunction(constructor)]
    return [*function.__mro__, *written] if dataclasses.is_dataclass(function) else [*written, *function.__mro__]


def _evaluated(annotation: Any, owner: Any) -> Any:
    """An annotation of `owner`, evaluated where it was written; `Unevaluated` if it cannot be."""
    module = getattr(sys.modules.get(owner.__module__), "__dict__", {})
    names = {**vars(owner), **module} if isinstance(owner, type) else getattr(owner, "__globals__", module)
    stub = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(stub, globalns=names, include_extras=True)["it"]
    except Exception:  # whatever evaluating somebody's annotations may raise
        return Unevaluated(str(annotation))
