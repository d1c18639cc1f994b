"""Converts a typed text to a value of the parameter's type; nothing is guessed.

Pydantic checks the values. Each level of a type has an `_Expected`, which gives unquoted text its meaning there.
"""

from __future__ import annotations

import contextlib
import functools
import re
import typing
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from fiddlehead.errors import ConfigError, nearest
from fiddlehead.recipe.hints import is_union, members
from fiddlehead.recipe.kinds import MismatchError, check_kind, is_named, is_part
from fiddlehead.recipe.literals import Bare, is_bracketed, literal, parse, parse_list
from fiddlehead.recipe.scalars import NONE, READERS, device, dtype, enum_member

if TYPE_CHECKING:
    from pydantic_core import CoreSchema, ValidationError
    from pydantic_core.core_schema import ValidationInfo


class Make(Protocol):
    """What names mean where they are typed."""

    def __call__(self, text: str) -> Any:
        """The configuration that ``name`` or ``name(argument=...)`` makes."""
        ...

    def named(self, reference: str) -> Any:
        """The class or function that ``package.module:name`` is."""
        ...


CALL = re.compile(r"(?P<name>[A-Za-z_][\w.]*(:[A-Za-z_][\w.]*)?)(\((?P<arguments>.*)\))?", re.DOTALL)

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*[.:][A-Za-z_][\w.]*")
_NARROW_FIRST = (type(None), typing.Literal, bool, int, float, Enum)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_SEQUENCES = (list, abc.Sequence, abc.MutableSequence, abc.Iterable, abc.Collection)
_CONTAINERS: dict[Any, Any] = {
    **dict.fromkeys(_SEQUENCES, list),
    **dict.fromkeys(_MAPPINGS, dict),
    **{kind: kind for kind in (tuple, set, frozenset)},
}
"""Types of containers, and what is made for each."""
# Modules of the standard library with classes that pydantic reads from a text.
_READABLE = ("datetime", "decimal", "uuid", "fractions", "ipaddress")
_ADVICE: dict[Any, str] = {
    bool: "write true or false",
    bytes: "write b'...'",
    abc.Callable: "write package.module:name",
    type: "write package.module:name",
    **dict.fromkeys(_MAPPINGS, "write {key: value}"),
}


def coerce(given: Any, hint: Any, make: Make) -> Any:
    """Converts `given` to a value of the type `hint`.

    `given` is a `Bare` as typed, a str that was in quotes, a list, tuple or dict of such, or any Python value that
    was loaded from a file. `make` turns ``name`` or ``name(argument=...)`` into a configuration where `hint` is a
    class.

    Raises:
        MismatchError: it does not fit the type.
        ConfigError: the typed text is not well formed, or names something that does not exist.
    """
    from pydantic_core import SchemaValidator, ValidationError

    try:
        value = SchemaValidator(_schema(hint)).validate_python(given, context=make)
    except ValidationError as error:
        raise _causes(error)[-1] from None
    check_kind(value, hint)
    return value


def _causes(error: ValidationError) -> list[ConfigError]:
    """The errors that the levels within have raised."""
    causes = [each.get("ctx", {}).get("error") for each in error.errors(include_url=False)]
    return [cause for cause in causes if isinstance(cause, ConfigError)]


def _schema(hint: Any, company: tuple[Any, ...] = ()) -> CoreSchema:
    """What pydantic checks for `hint`; `company` is what else may stand there, if it is a member of a union."""
    from pydantic_core import core_schema

    if isinstance(hint, typing.NewType):
        return _schema(hint.__supertype__, company)
    if not members(hint):
        return core_schema.no_info_plain_validator_function(literal)
    expected = _Expected(dict[str, Any] if typing.is_typeddict(hint) else hint, company)
    return core_schema.with_info_wrap_validator_function(expected, _inner_schema(expected))


def _inner_schema(expected: _Expected) -> CoreSchema:
    """What pydantic checks at one level: the value itself, and the levels within."""
    from pydantic_core import core_schema

    kind, arguments = expected.kind, typing.get_args(expected.hint)
    if is_union(expected.hint):
        others = {each: tuple({*arguments} - {each, type(None)}) for each in arguments}
        choices = [_schema(each, others[each]) for each in sorted(arguments, key=_breadth)]
        return core_schema.union_schema(choices, mode="left_to_right")  # type: ignore[arg-type]
    if kind is Annotated or _is_readable(kind):
        from pydantic import TypeAdapter

        if kind is not Annotated:
            read = TypeAdapter(kind).core_schema
            return core_schema.no_info_before_validator_function(
                lambda given: given if isinstance(given, kind) else str(given), read
            )
        constraints = TypeAdapter(Annotated[(Any, *expected.hint.__metadata__)]).core_schema  # type: ignore[arg-type]
        return core_schema.chain_schema([_schema(arguments[0], expected.company), constraints])
    if container := _CONTAINERS.get(kind):
        items = [_schema(each) for each in arguments or (Any, Any) if each is not Ellipsis]
        if container is dict:
            return core_schema.dict_schema(*items)
        if container is tuple:
            variadic = None if arguments and Ellipsis not in arguments else 0
            return core_schema.tuple_schema(items if variadic is None else items[:1], variadic_item_index=variadic)
        return getattr(core_schema, f"{container.__name__}_schema")(items[0])
    if kind in (bool, int, float, str, bytes):
        return getattr(core_schema, f"{kind.__name__}_schema")(strict=True)
    if kind is typing.Literal:
        return core_schema.literal_schema([*arguments])
    if kind is abc.Callable:
        return core_schema.callable_schema()
    return core_schema.no_info_plain_validator_function(functools.partial(_instance, kind))


def _instance(kind: Any, value: Any) -> Any:
    with contextlib.suppress(TypeError):  # a protocol that is for type checkers only
        if isinstance(value, kind):
            return value
    raise ValueError


def _is_readable(kind: Any) -> bool:
    """Whether pydantic reads a class from a text."""
    return isinstance(kind, type) and kind.__module__ in _READABLE


def _breadth(member: Any) -> int:
    """The order in which the members of a union are tried: those that accept the fewest texts come first."""
    kind = typing.get_origin(member) or member
    kind = Enum if isinstance(kind, type) and issubclass(kind, Enum) else kind
    if kind in _NARROW_FIRST:
        return _NARROW_FIRST.index(kind)
    last = (str, Path, PurePath, Any)
    return 20 + last.index(kind) if kind in last else 10 if kind in _CONTAINERS else 9 if _is_torch(kind) else 11


@dataclass(frozen=True)
class _Expected:
    """What is expected at one level of a type, where pydantic calls it with what was given.

    `company` are the other members of a union. Beside them a text is read strictly: 1 is an int, and not also a bool.
    """

    hint: Any
    company: tuple[Any, ...]

    @property
    def kind(self) -> Any:
        return typing.get_origin(self.hint) or self.hint

    def __call__(self, given: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        from pydantic_core import ValidationError

        value = self._read(given, info.context) if isinstance(given, str) else given
        if is_named(value):
            return value  # checked when all is read: else a union would take a wrong part for a text
        try:
            return handler(value)
        except ValidationError as error:
            causes = _causes(error)
            about_parts = [cause for cause in causes if getattr(cause, "given", None) is not given]
            if about_parts:
                raise about_parts[-1 if is_union(self.hint) else 0] from None
            if self.kind is Annotated and causes:
                raise causes[0] from None
            raise MismatchError(given, self.hint, self._advice(given, value, error)) from None

    def _advice(self, given: Any, value: Any, error: ValidationError) -> str:
        first, *others = members(self.hint)
        choices = [str(choice) for kind in (first, *others) for choice in _choices(kind)]
        if choices:
            match = nearest(str(given), choices)
            return f"did you mean {match!r}?" if match else ""
        if others:
            return ""
        if is_union(self.hint):
            return getattr(_causes(error)[-1], "advice", "")
        if self.kind is tuple and isinstance(value, (list, tuple)):
            return f"that is {len(value)} values, not {len(typing.get_args(self.hint))}"
        if self.kind is Annotated or _is_readable(self.kind):
            return error.errors()[0]["msg"]
        return _ADVICE.get(
            self.kind, "name a factory, name(argument=...), or a file, @file.yaml" if is_part(first) else ""
        )

    def _read(self, given: str, make: Any) -> Any:
        """The value that a text means here; the text itself if it has no such meaning."""
        kind = self.kind
        if isinstance(kind, type) and issubclass(kind, Enum):
            return enum_member(given, kind)
        if _is_torch(kind):
            return dtype(given) if kind.__name__ == "dtype" else device(given)
        if kind in READERS:
            return READERS[kind](given, self.hint, self.company) if isinstance(given, Bare) else given
        if kind is Annotated or is_union(self.hint):
            return given
        if given == "" or (isinstance(given, Bare) and given in NONE):
            raise MismatchError(given, self.hint)
        if isinstance(kind, type) and issubclass(kind, PurePath):
            return kind(given)
        if not isinstance(given, Bare):
            return given
        if kind in _CONTAINERS:
            several = is_bracketed(given) or (str not in self.company and len(parse_list(given)) > 1)
            return given if self.company and not several else (parse if kind in _MAPPINGS else parse_list)(given)
        call = CALL.fullmatch(given)
        if str in self.company and not (call and (call["arguments"] is not None or ":" in call["name"])):
            raise MismatchError(given, self.hint)
        if not call or _is_readable(kind):
            return given
        is_reference = kind in (abc.Callable, type) and _REFERENCE.fullmatch(given)
        return make.named(given) if is_reference else make(given)


def _choices(hint: Any) -> list[Any]:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return list(hint.__members__)
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []


def _is_torch(hint: Any) -> bool:
    return getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") in ("dtype", "device")
