"""From what was typed to a value of the type that a parameter asks for; nothing is guessed."""

from __future__ import annotations

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Protocol

import fiddle as fdl

from fiddlehead.errors import ConfigError, nearest, unknown
from fiddlehead.recipe.hints import Unevaluated
from fiddlehead.recipe.leaves import show
from fiddlehead.recipe.literals import Bare, is_bracketed, literal, parse, parse_list


class Make(Protocol):
    """What names mean where they are typed."""

    def __call__(self, text: str) -> Any:
        """The configuration that ``name`` or ``name(argument=...)`` makes."""
        ...

    def named(self, reference: str) -> Any:
        """The class or function that ``package.module:name`` is."""
        ...


CALL = re.compile(r"(?P<name>[A-Za-z_][\w.]*(:[A-Za-z_][\w.]*)?)(\((?P<arguments>.*)\))?", re.DOTALL)

_INT = re.compile(r"[-+]?\d+(_\d+)*")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*[.:][A-Za-z_][\w.]*")
_NONE = ("None", "null")
_BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_CONTAINERS = (*_SEQUENCES, *_MAPPINGS, tuple, set, frozenset, collections.abc.MutableSequence)
# Classes of the standard library that pydantic reads from a text.
_READABLE = ("datetime", "decimal", "uuid", "fractions", "ipaddress")


class MismatchError(ConfigError):
    """The value is not of the type; the message says which."""

    def __init__(self, given: Any, hint: Any, advice: str = "") -> None:
        self.given = given
        self.advice = advice
        shown = "nothing" if given == "" and isinstance(given, Bare) else show_given(given)
        super().__init__(f"expects {describe(hint)}, not {shown}{advice and '; ' + advice}")


def coerce(given: Any, hint: Any, make: Make) -> Any:
    """`given` as a value of the type `hint`.

    `given` is a `Bare` as typed, a str that was in quotes, a list, tuple or dict of such, or any Python value that
    was loaded from a file. `make` turns ``name`` or ``name(argument=...)`` into a configuration where `hint` is a
    class. Raises MismatchError, or a ConfigError that says more.
    """
    origin = typing.get_origin(hint) or hint
    if hint in (Any, object) or isinstance(hint, typing.TypeVar):
        return literal(given)
    if origin is typing.Annotated:
        return _validated(coerce(given, typing.get_args(hint)[0], make), hint, given)
    if isinstance(hint, typing.NewType):
        return coerce(given, hint.__supertype__, make)
    if origin in (typing.Union, types.UnionType):
        return _union(given, hint, make)
    if origin is typing.Literal:
        return _literal(given, hint)
    if hint in (None, type(None)):
        if given is None or (isinstance(given, Bare) and given in _NONE):
            return None
        raise MismatchError(given, hint)
    if hint in _SCALARS:
        return _SCALARS[hint](given, hint)
    if origin in _CONTAINERS:
        return _container(given, hint, origin, make)
    if origin in (collections.abc.Callable, type):
        return _callable(given, hint, origin, make)
    if isinstance(hint, type):
        return _instance(given, hint, make)
    return _instance(given, origin, make)


def describe(hint: Any) -> str:
    """A type as one would write it in an annotation."""
    if isinstance(hint, Unevaluated):
        return hint.text
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(describe(arg) for arg in args))
    if origin is typing.Literal:
        return " | ".join(map(show, args))
    if origin is typing.Annotated:
        return describe(args[0])
    if hint in (None, type(None)):
        return "None"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(hint.__members__)}"
    if isinstance(hint, type) and origin is None:
        return hint.__name__
    return re.sub(r"\b(typing|collections\.abc)\.", "", str(hint))


def show_given(given: Any) -> str:
    """What was given, as it was typed."""
    return f"'{given}'" if isinstance(given, Bare) else show(given)


def _bool(given: Any, hint: Any) -> bool:
    if isinstance(given, bool):
        return given
    if isinstance(given, Bare) and given.strip().lower() in _BOOL:
        return _BOOL[given.strip().lower()]
    raise MismatchError(given, hint, "write true or false")


def _int(given: Any, hint: Any) -> int:
    if type(given) is int:
        return given
    if isinstance(given, Bare):
        if _INT.fullmatch(given.strip()):
            if len(given) > 4000:
                raise MismatchError(given, hint, "a number of so many digits is not read")
            return int(given)
        try:
            number = Decimal(given.strip())
        except InvalidOperation:
            raise MismatchError(given, hint) from None
        if number.is_finite() and number.adjusted() < 30 and number == number.to_integral_value():
            return int(number)
    raise MismatchError(given, hint)


def _float(given: Any, hint: Any) -> float:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        try:
            return float(given)
        except OverflowError:
            raise MismatchError(given, hint, "the number is too large") from None
    if isinstance(given, Bare):
        try:
            return float(given)
        except ValueError:
            pass
    raise MismatchError(given, hint)


def _str(given: Any, hint: Any) -> str:
    if isinstance(given, Bare):
        if given in _NONE:
            raise MismatchError(given, hint, f"for that text write '\"{given}\"'")
        return str(given)
    if isinstance(given, str):
        return given
    raise MismatchError(given, hint)


def _bytes(given: Any, hint: Any) -> bytes:
    if isinstance(given, bytes):
        return given
    value = literal(given)
    if isinstance(value, bytes):
        return value
    raise MismatchError(given, hint, "write b'...'")


def _path(given: Any, hint: Any) -> PurePath:
    if isinstance(given, PurePath):
        return given
    if isinstance(given, str) and given and not (isinstance(given, Bare) and given in _NONE):
        return hint(given) if issubclass(hint, PurePath) else Path(given)
    raise MismatchError(given, hint)


_SCALARS: dict[Any, Callable[[Any, Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    bytes: _bytes,
    Path: _path,
    PurePath: _path,
}


def _union(given: Any, hint: Any, make: Make) -> Any:
    """The first member, the narrowest first, that takes `given`; a text is what nothing else in the union is."""
    members = typing.get_args(hint)
    if isinstance(given, Bare) and given in _NONE and type(None) in members:
        return None
    telling: ConfigError | None = None
    advice = ""
    for member in sorted(members, key=_breadth):
        if isinstance(given, Bare) and not _could_mean(given, member, members):
            continue
        try:
            return coerce(given, member, make)
        except MismatchError as error:
            if error.given is not given:
                telling = error  # about a part of what was given
            advice = error.advice or advice
        except ConfigError as error:
            telling = error
    match = nearest(str(given), [str(value) for member in members for value in _choices(member)])
    optional = len(set(members) - {type(None)}) == 1
    raise telling or MismatchError(given, hint, f"did you mean {match!r}?" if match else advice if optional else "")


def _choices(hint: Any) -> list[Any]:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return list(hint.__members__)
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []


def _breadth(member: Any) -> int:
    origin = typing.get_origin(member) or member
    narrow_first = (typing.Literal, bool, int, float)
    if origin in narrow_first:
        return narrow_first.index(origin)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return 4
    if origin in _CONTAINERS:
        return 6
    return {str: 8, Path: 9, PurePath: 9, Any: 10}.get(origin, 5 if _is_torch(origin) else 7)


def _could_mean(given: Bare, member: Any, members: tuple[Any, ...]) -> bool:
    """Whether, in this company, an unquoted text may be taken for `member`: what is also a number is a number."""
    origin = typing.get_origin(member) or member
    others = set(members) - {member}
    if member is bool and others & {int, float, str}:
        return given.lower() in ("true", "false")
    if member is int and others & {float, str}:
        return bool(_INT.fullmatch(given.strip()))
    if origin in _CONTAINERS and others - {type(None)}:
        return is_bracketed(given) or (str not in members and len(parse_list(given)) > 1)
    if str not in members or member in _SCALARS or origin is typing.Literal or _breadth(member) in (4, 5):
        return True
    call = CALL.fullmatch(given)
    return bool(call and (call["arguments"] is not None or ":" in call["name"]))


def _literal(given: Any, hint: Any) -> Any:
    allowed = typing.get_args(hint)
    for value in sorted(allowed, key=lambda value: isinstance(value, str)):
        if isinstance(value, Enum):
            if given is value or (isinstance(given, str) and given == value.name):
                return value
        elif type(given) is type(value) and given == value:
            return value
        elif isinstance(given, Bare):
            if isinstance(value, str) and given == value:
                return value
            if not isinstance(value, str):
                try:
                    if coerce(given, type(value), _NoNames()) == value:
                        return value
                except ConfigError:
                    pass
    match = nearest(str(given), [str(value) for value in _choices(hint)])
    raise MismatchError(given, hint, f"did you mean {match!r}?" if match else "")


def _container(given: Any, hint: Any, origin: Any, make: Make) -> Any:
    arguments = typing.get_args(hint)
    if origin in _MAPPINGS:
        mapping = parse(given) if isinstance(given, Bare) else given
        if not isinstance(mapping, dict):
            raise MismatchError(given, hint, "write {key: value}")
        key_hint, item_hint = arguments or (Any, Any)
        return {coerce(key, key_hint, make): coerce(item, item_hint, make) for key, item in mapping.items()}
    if isinstance(given, Bare) and given in ("", *_NONE):
        raise MismatchError(given, hint)
    members = parse_list(given) if isinstance(given, Bare) else given
    if not isinstance(members, (list, tuple, set, frozenset)):
        raise MismatchError(given, hint)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        arguments = () if arguments == ((),) else arguments
        if len(arguments) != len(members):
            raise MismatchError(given, hint, f"that is {len(members)} values, not {len(arguments)}")
        return tuple(coerce(member, argument, make) for member, argument in zip(members, arguments, strict=True))
    item_hint = arguments[0] if arguments else Any
    values = [coerce(member, item_hint, make) for member in members]
    return origin(values) if origin in (tuple, set, frozenset) else values


def _callable(given: Any, hint: Any, origin: Any, make: Make) -> Any:
    """A class or function named by its path; only here does a text import anything."""
    if isinstance(given, fdl.Buildable):
        return given
    value = given
    if isinstance(given, Bare):
        if not _REFERENCE.fullmatch(given):
            if CALL.fullmatch(given) and given not in _NONE:
                return make(given)
            raise MismatchError(given, hint, "write package.module:name")
        value = make.named(given)
    bound = (typing.get_args(hint) or (object,))[0]
    if not callable(value) or isinstance(value, str) or (origin is type and not _is_subclass(value, bound)):
        raise MismatchError(given, hint)
    return value


def _instance(given: Any, hint: Any, make: Make) -> Any:
    """A value of some class: one that pydantic or torch reads from a text, or else a configuration of it."""
    if isinstance(given, fdl.Buildable):
        return given
    if isinstance(given, str) and isinstance(hint, type) and issubclass(hint, Enum):
        return _enum(given, hint)
    if isinstance(given, str) and _is_torch(hint):
        return _torch(given, hint)
    if isinstance(hint, type) and not isinstance(given, Bare) and _is_instance(given, hint):
        return given
    if getattr(hint, "__module__", "") in _READABLE or typing.is_typeddict(hint):
        return _validated(literal(given) if typing.is_typeddict(hint) else str(given), hint, given)
    if isinstance(given, Bare) and given and given not in _NONE and CALL.fullmatch(given):
        return make(given)
    raise MismatchError(given, hint, "name a factory, name(argument=...), or a file, @file.yaml")


def _enum(given: str, hint: type[Enum]) -> Enum:
    if given in hint.__members__:
        return hint[given]
    for member in hint:
        if str(member.value) == given:
            return member
    raise ConfigError(unknown(hint.__name__, given, list(hint.__members__)))


def _is_torch(hint: Any) -> bool:
    return getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") in ("dtype", "device")


def _torch(given: str, hint: Any) -> Any:
    import torch

    if hint is torch.device:
        try:
            return torch.device(given)
        except RuntimeError:
            raise MismatchError(given, hint) from None
    name = given.removeprefix("torch.")
    return dtype(_DTYPES.get(name, name))


def dtype(name: str) -> Any:
    """The `torch.dtype` of this name; ConfigError if there is none."""
    import torch

    # Not getattr, for which torch imports modules of its own.
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    if name not in dtypes:
        raise ConfigError(unknown("dtype", name, sorted(dtypes)))
    return dtypes[name]


def _validated(value: Any, hint: Any, given: Any) -> Any:
    """`value` as pydantic takes it for `hint`, with the constraints of an `Annotated`."""
    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:
        arbitrary = None if typing.is_typeddict(hint) else ConfigDict(arbitrary_types_allowed=True)
        return value if isinstance(value, fdl.Buildable) else TypeAdapter(hint, config=arbitrary).validate_python(value)
    except PydanticSchemaGenerationError:
        return value
    except ValidationError as error:
        raise MismatchError(given, hint, error.errors()[0]["msg"]) from None


def _is_instance(value: Any, kind: type) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that is for type checkers only
        return False


def _is_subclass(value: Any, bound: Any) -> bool:
    bound = typing.get_origin(bound) or bound
    return inspect.isclass(value) and (not inspect.isclass(bound) or issubclass(value, bound))


class _NoNames:
    """For places where nothing can be named."""

    def __call__(self, text: str) -> Any:
        raise MismatchError(Bare(text), Any)

    def named(self, reference: str) -> Any:
        raise MismatchError(Bare(reference), Any)
