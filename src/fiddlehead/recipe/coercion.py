"""Converts a typed text to a value of the parameter's type; nothing is guessed.

The type says what an unquoted text means, level by level; pydantic checks the plain values.
"""

from __future__ import annotations

import contextlib
import re
import typing
from collections import abc
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePath
from typing import Annotated, Any, Protocol

from fiddlehead.errors import ConfigError, nearest
from fiddlehead.recipe.hints import choices, is_union, members
from fiddlehead.recipe.kinds import MismatchError, check_kind, is_named, is_part
from fiddlehead.recipe.literals import Bare, is_bracketed, literal, parse, parse_list
from fiddlehead.recipe.scalars import NONE, READERS, Company, device, dtype, enum_member


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
_PLAIN = (bool, int, float, str, bytes)
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
    value = _value(given, hint, make)
    check_kind(value, hint)
    return value


def check_type(value: Any, hint: Any, is_free: Callable[[Any], bool]) -> None:
    """Refuses a Python value that is not of the type `hint`; `is_free` is that of `check_kind`.

    Raises:
        MismatchError: with what the annotation asks for.
    """
    _value(value, hint, typing.cast("Make", None))  # only typed texts have names that something is made of
    check_kind(value, hint, is_free)


def _value(given: Any, hint: Any, make: Make, company: Company = ()) -> Any:
    """`given` as a value of the type `hint`. Where a text names a part of another type, `check_kind` says so later.

    `company` are the other members of a union. Beside them a text is read strictly: 1 is an int, and not also a bool.
    """
    if isinstance(hint, typing.NewType):
        return _value(given, hint.__supertype__, make, company)
    if not members(hint):
        return literal(given)
    if is_named(given):
        return given
    if is_union(hint):
        return _member(given, hint, make)
    hint = dict[str, Any] if typing.is_typeddict(hint) else hint
    kind = typing.get_origin(hint) or hint
    if kind is Annotated:
        value = _value(given, hint.__origin__, make, company)
        return _checked(value, Annotated[(Any, *hint.__metadata__)], given, hint)
    value = _meaning(given, hint, make, company) if isinstance(given, str) else given
    if is_named(value):
        return value
    if kind in _CONTAINERS:
        return _container(value, hint, make, given)
    if _is_readable(kind):
        return _checked(value if isinstance(value, kind) else str(value), kind, given, hint)
    if kind in (*_PLAIN, typing.Literal, abc.Callable):
        return _checked(value, hint, given, hint, _advice(given, hint), strict=kind in _PLAIN)
    with contextlib.suppress(TypeError):  # a protocol that is for type checkers only
        if isinstance(value, kind):
            return value
    raise MismatchError(given, hint, _advice(given, hint))


def _member(given: Any, union: Any, make: Make) -> Any:
    """`given` as a value of the first member of a union that it fits; those that accept the fewest texts come first."""
    kinds, errors = typing.get_args(union), list[Any]()
    for kind in sorted(kinds, key=_breadth):
        try:
            return _value(given, kind, make, tuple({*kinds} - {kind, type(None)}))
        except ConfigError as error:
            errors.append(error)
    within = [error for error in errors if getattr(error, "given", None) is not given]
    if within:
        raise within[-1]
    raise MismatchError(given, union, errors[-1].advice if len(members(union)) == 1 else _advice(given, union))


def _container(value: Any, hint: Any, make: Make, given: Any) -> Any:
    """A list, tuple, set or dict, and all of its members, as values of the type `hint`."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    made, fixed = _CONTAINERS[kind], kind is tuple and bool(arguments) and Ellipsis not in arguments
    if made is dict and isinstance(value, abc.Mapping):
        of_key, of_item = arguments or (Any, Any)
        inner = [(_value(key, of_key, make), _value(item, of_item, make)) for key, item in value.items()]
    elif fixed and isinstance(value, (list, tuple)):
        inner = [_value(item, each, make) for item, each in zip(value, arguments, strict=False)]
        if len(value) != len(arguments):
            raise MismatchError(given, hint, f"that is {len(value)} values, not {len(arguments)}")
    elif made is not dict and not fixed and _is_listed(value):
        inner = [_value(item, arguments[0] if arguments else Any, make) for item in value]
    else:
        raise MismatchError(given, hint, _advice(given, hint))
    try:
        return made(inner)
    except TypeError:  # a list in a set
        raise MismatchError(given, hint) from None


def _is_listed(value: Any) -> bool:
    return isinstance(value, abc.Iterable) and not isinstance(value, (str, bytes, abc.Mapping))


def _checked(value: Any, kind: Any, given: Any, hint: Any, advice: str | None = None, *, strict: bool = False) -> Any:
    """What pydantic makes of a value for `kind`; a mismatch has the `advice`, or else pydantic's own words."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value, strict=strict)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"]
        raise MismatchError(given, hint, said if advice is None else advice) from None


def _advice(given: Any, hint: Any) -> str:
    """What to write for a type: the nearest of its choices, or the form of its values; "" if nothing helps."""
    if few := [str(choice) for kind in members(hint) for choice in choices(kind)]:
        match = nearest(str(given), few)
        return f"did you mean {match!r}?" if match else ""
    kind = typing.get_origin(hint) or hint
    return _ADVICE.get(kind, "name a factory, name(argument=...), or a file, @file.yaml" if is_part(kind) else "")


def _breadth(member: Any) -> int:
    """How many texts a member of a union accepts, as a rank."""
    kind = typing.get_origin(member) or member
    kind = Enum if isinstance(kind, type) and issubclass(kind, Enum) else kind
    if kind in _NARROW_FIRST:
        return _NARROW_FIRST.index(kind)
    last = (str, Path, PurePath, Any)
    return 20 + last.index(kind) if kind in last else 10 if kind in _CONTAINERS else 9 if _is_torch(kind) else 11


def _meaning(given: str, hint: Any, make: Make, company: Company) -> Any:
    """The value that a text means for a type; the text itself if it has no such meaning."""
    kind = typing.get_origin(hint) or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return enum_member(given, kind)
    if _is_torch(kind):
        return dtype(given) if kind.__name__ == "dtype" else device(given)
    if kind in READERS:
        return READERS[kind](given, hint, company) if isinstance(given, Bare) else given
    if given == "" or (isinstance(given, Bare) and given in NONE):
        raise MismatchError(given, hint)
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return kind(given)
    if not isinstance(given, Bare):
        return given
    if kind in _CONTAINERS:
        several = is_bracketed(given) or (str not in company and len(parse_list(given)) > 1)
        return given if company and not several else (parse if kind in _MAPPINGS else parse_list)(given)
    call = CALL.fullmatch(given)
    if str in company and not (call and (call["arguments"] is not None or ":" in call["name"])):
        raise MismatchError(given, hint)
    if not call or _is_readable(kind):
        return given
    is_reference = kind in (abc.Callable, type) and _REFERENCE.fullmatch(given)
    return make.named(given) if is_reference else make(given)


def _is_readable(kind: Any) -> bool:
    """Whether pydantic reads a class from a text."""
    return isinstance(kind, type) and kind.__module__ in _READABLE


def _is_torch(hint: Any) -> bool:
    return getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") in ("dtype", "device")
