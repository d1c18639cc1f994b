"""The JSON Schema of a recipe's YAML: an editor that has it completes and checks what is typed."""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from typing import Any

from fiddlehead.recipe.allowed import TASKS, WITHHELD, is_trainer, reference_to
from fiddlehead.recipe.fields import described_parts, docs_of, parameters, parts_for
from fiddlehead.recipe.hints import members, parameter_hint
from fiddlehead.recipe.schema import ARGS, PARTIAL, TARGET

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string"}
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_MAPS = (dict, collections.abc.Mapping)


def recipe_schema() -> Schema:
    """The schema of every recipe's YAML, with a definition for each part that comes with the package.

    A part of the user's own is an object with a `_target_` of another name; its arguments are not checked. A value with
    a tag of ours, such as `!path`, is checked as the text, list or object that follows the tag.
    """
    tasks = [getattr(importlib.import_module(module), task) for module, names in TASKS.items() for task in names]
    definitions = {part.__name__: _call(part) for part in described_parts()}
    return {
        "$schema": DIALECT,
        "title": "fiddlehead recipe",
        "oneOf": [_call(task) for task in tasks],
        "$defs": definitions | {"own": _own()},
    }


def _call(function: Callable[..., Any]) -> Schema:
    """An object that calls a class or function with named arguments."""
    docs = docs_of(function)
    properties: Schema = {
        TARGET: {"const": reference_to(function)},
        PARTIAL: {"type": "boolean"},
        ARGS: {"type": "array"},
    }
    for name in parameters(function):
        if not (name in WITHHELD and is_trainer(function)):
            text = {"description": docs[name]} if docs.get(name) else {}
            properties[name] = _of(parameter_hint(function, name)) | text
    about = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
    return {
        "type": "object",
        "description": about,
        "properties": properties,
        "required": [TARGET],
        "additionalProperties": False,
    }


def _own() -> Schema:
    """A part of the user's own."""
    known = [reference_to(part) for part in described_parts()]
    return {
        "type": "object",
        "properties": {TARGET: {"type": "string", "not": {"enum": known}}},
        "required": [TARGET],
    }


def _of(hint: Any) -> Schema:
    """The schema of a parameter's values; empty, which allows all, for a type that cannot be told."""
    kinds = members(hint)
    found: list[Schema] = [{"$ref": f"#/$defs/{part.__name__}"} for part in parts_for(hint)]
    for kind in kinds:
        made = _of_kind(kind)
        if not made and not found:
            return {}
        found += [made] if made else []
    if not kinds:
        return {}
    if any(each.get("$ref") for each in found):
        found.append({"$ref": "#/$defs/own"})
    if type(None) in typing.get_args(hint):
        found.append({"type": "null"})
    return found[0] if len(found) == 1 else {"anyOf": found}


def _of_kind(kind: Any) -> Schema:
    """The schema of one member of a union; empty for a class that is no plain value."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in _PLAIN:
        return {"type": _PLAIN[origin]}
    if origin is typing.Literal:
        return {"enum": [*arguments]}
    if origin in _LISTS:
        return {"type": "array", **_items(origin, arguments)}
    if origin in _MAPS:
        return {"type": "object"}
    is_class = inspect.isclass(origin)
    is_text = is_class and (issubclass(origin, PurePath | Enum) or origin.__module__ == "torch")
    return {"type": "string"} if is_text else {}


def _items(origin: Any, arguments: tuple[Any, ...]) -> Schema:
    if origin is tuple and arguments and Ellipsis not in arguments:
        return {"prefixItems": [_of(each) for each in arguments], "items": False, "minItems": len(arguments)}
    return {"items": _of(arguments[0])} if arguments else {}
