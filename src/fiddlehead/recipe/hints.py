"""The type that a parameter of a class or function asks for."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from typing import Any

import fiddle as fdl

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

    Strings are evaluated, one by one if need be: an annotation that cannot be is `Unevaluated`.
    """
    parameter = _signature(function).parameters[name]
    for source in _annotated(function):
        try:
            hints = typing.get_type_hints(source, include_extras=True)
        except Exception:  # whatever evaluating somebody's annotations may raise
            hints = {name: _evaluate(source, name)}
        if name in hints and hints[name] is not None:
            hint = hints[name]
            break
    else:
        hint = parameter.annotation if parameter.annotation is not parameter.empty else Any
    if isinstance(hint, str):
        hint = Unevaluated(hint)
    return hint.type if isinstance(hint, dataclasses.InitVar) else hint


def argument_hint(config: fdl.Buildable, key: str | int) -> Any:
    """The annotation of the argument `key` of a configuration, which may be one of ``*args`` or ``**kwargs``."""
    info = config.__signature_info__
    if isinstance(key, int):
        start = info.var_positional_start
        name = list(info.parameters)[key if start is None else min(key, start)]
    else:
        name = key if key in info.parameters else info.var_keyword_name
    return parameter_hint(fdl.get_callable(config), name) if name else Any


def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(typing.get_origin(function) or function)


def _annotated(function: Any) -> list[Any]:
    """The objects whose annotations describe the parameters of `function`, the one that decides first."""
    function = typing.get_origin(function) or function
    if not isinstance(function, type):
        return [inspect.unwrap(function)]
    constructors = [function.__init__, function.__new__]
    written = [inspect.unwrap(constructor) for constructor in constructors if inspect.isfunction(constructor)]
    return [function, *written] if dataclasses.is_dataclass(function) else [*written, function]


def _evaluate(source: Any, name: str) -> Any:
    """The one annotation `name`, evaluated where it was written; `Unevaluated` if it cannot be; None if missing."""
    owners = source.__mro__ if isinstance(source, type) else [source]
    for owner in owners:
        annotation = inspect.get_annotations(owner).get(name)
        if annotation is None:
            continue
        namespace = getattr(owner, "__globals__", None) or vars(sys.modules[owner.__module__])
        stub = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            return typing.get_type_hints(stub, globalns=namespace, include_extras=True)[name]
        except Exception:
            return Unevaluated(str(annotation))
    return None
