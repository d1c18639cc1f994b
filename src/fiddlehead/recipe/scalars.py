"""The meaning of unquoted text for a number, a string, a choice, a dtype or a device."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe.kinds import MismatchError
from fiddlehead.recipe.leaves import same
from fiddlehead.recipe.literals import Bare, literal

Company = tuple[Any, ...]
"""The other members of the union that a type is in."""

NONE = ("None", "null")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_INT = re.compile(r"[-+]?\d+(_\d+)*")
_MOST_DIGITS = 3000  # Python does not write longer numbers
_EXACT_BOOL = {"true": True, "false": False}
_BOOL = {**_EXACT_BOOL, "yes": True, "1": True, "no": False, "0": False}


def _int(given: Bare, hint: Any, company: Company) -> Any:
    """The integer that a text is; alone, it may be written 1e3 or 10.0."""
    text = given.strip()
    if _INT.fullmatch(text):
        return int(text) if len(text) <= _MOST_DIGITS else given
    try:
        number = Decimal("nan" if {float, str} & {*company} else text)
    except InvalidOperation:
        return given
    is_whole = number.is_finite() and number.adjusted() < 30 and number == number.to_integral_value()
    return int(number) if is_whole else given


def _float(given: Bare, hint: Any, company: Company) -> Any:
    try:
        return float(given)
    except ValueError:
        return given


def _str(given: Bare, hint: Any, company: Company) -> str:
    if given in NONE:
        raise MismatchError(given, str, f"for that text write '\"{given}\"'")
    return str(given)


def _choice(given: Bare, hint: Any, company: Company) -> Any:
    """The choice of a Literal that a text is; an Enum's is written by its name."""
    for choice in typing.get_args(hint):
        if given == (choice.name if isinstance(choice, Enum) else choice) or same(literal(given), choice):
            return choice
    return given


READERS: dict[Any, Callable[[Bare, Any, Company], Any]] = {
    type(None): lambda given, hint, company: None if given in NONE else given,
    bool: lambda given, hint, company: (_EXACT_BOOL if company else _BOOL).get(given.strip().lower(), given),
    int: _int,
    float: _float,
    str: _str,
    bytes: lambda given, hint, company: literal(given),
    typing.Literal: _choice,
}
"""What an unquoted text means where a plain value belongs; the text itself if it means nothing of the kind."""


def enum_member(given: str, hint: type[Enum]) -> Enum:
    """The member that has this name, or this value."""
    found = {**{str(member.value): member for member in hint}, **hint.__members__}
    if given not in found:
        raise ConfigError(Problem.unknown("", given, hint.__name__, list(hint.__members__)))
    return found[given]


def dtype(name: str) -> Any:
    """The `torch.dtype` of this name; ConfigError if there is none."""
    import torch

    # Not getattr, for which torch imports modules of its own.
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    name = name.removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if name not in dtypes:
        raise ConfigError(Problem.unknown("", name, "dtype", sorted(dtypes)))
    return dtypes[name]


def device(name: str) -> Any:
    """The `torch.device` of this name; ConfigError if there is none."""
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is not a device: {error}") from error
