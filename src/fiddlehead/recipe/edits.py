"""Edits of a recipe as they are typed: ``trainer.max_steps=10 optim.lr*=2 model=tiny(num_layers=2)``."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import fiddle as fdl
from fiddle import history

from fiddlehead.errors import ConfigError, unknown
from fiddlehead.files.foreign import MAX_TEXT, read_text
from fiddlehead.files.paths import user_path
from fiddlehead.recipe import Recipe, reader
from fiddlehead.recipe.coercion import CALL, Make, MismatchError, coerce
from fiddlehead.recipe.hints import Unevaluated, parameter_hint
from fiddlehead.recipe.kinds import check_kind, members
from fiddlehead.recipe.leaves import leaves, show
from fiddlehead.recipe.literals import Bare, literal, split_arguments, typed
from fiddlehead.recipe.references import named
from fiddlehead.recipe.slots import Slot, find_slot

Find = Callable[[str], Callable[..., Any]]

_OVERRIDE = re.compile(
    r"(?P<path>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*|\[[^\]]*\])*)(?P<sign>[-+*/]?)=(?P<value>.*)", re.DOTALL
)
_READ_FROM_FILES = ("TokenizerFile",)
"""Parts that are what the file at their `path` says."""
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class _Override:
    """One edit as typed, and its parts; `sign` is '' for plain assignment."""

    text: str
    path: str
    sign: str
    value: str


def apply_overrides(
    recipe: Recipe, overrides: Iterable[str], *, find: Find | None = None, allow: Sequence[str] = ()
) -> Recipe:
    """A copy of `recipe` with the edits applied in the order given.

    An edit is ``path=value``, or ``path+=value`` and likewise ``-= *= /=`` for numbers; ``+=`` also extends lists and
    texts. A path is dotted names, with ``[0]`` or ``[key]`` for members of lists and dicts. The value is read as the
    parameter's annotation asks: quotes make it a text, ``@file.yaml`` a file's content, and where a configuration
    belongs, ``name`` or ``name(argument=value)`` calls the function that `find` gives for the name, or configures the
    class. ``package.module:name`` must be one of the parts that a recipe file may name, or be in `allow`.

    Raises one ConfigError with the mistakes of all edits. An edit that a later one would discard is a mistake too.
    """
    recipe = copy.deepcopy(recipe)
    editor = _Editor(recipe, find, allow)
    problems = []
    for text in overrides:
        try:
            editor.apply(_parse(text))
        except ConfigError as error:
            problems += [f"{text}: {problem}" for problem in error.problems]
        except RecursionError:
            problems.append(f"{text}: nested too deep")
    if problems:
        raise ConfigError(*problems)
    return recipe


def _parse(text: str) -> _Override:
    match = _OVERRIDE.fullmatch(text)
    if not match:
        raise ConfigError("not of the form path=value, such as trainer.max_steps=10, without spaces around the sign")
    return _Override(text, match["path"], match["sign"], match["value"])


class _Editor:
    """Applies edits to one recipe and remembers them, so that none is lost unnoticed."""

    def __init__(self, recipe: Recipe, find: Find | None, allow: Sequence[str]) -> None:
        self._recipe = recipe
        self._find = find
        self._allow = allow
        self._edits: list[tuple[_Override, Slot]] = []

    def apply(self, override: _Override) -> None:
        slot = find_slot(self._recipe, override.path)
        here = _location(override)
        if override.sign:
            value = _computed(override, slot, self._names(here))
        else:
            for earlier, edited in self._edits:
                if slot.holds(edited):
                    raise ConfigError(f"discards the earlier {earlier.text}; give only one of them")
            try:
                value = self._value(override.value, slot, here)
            except ConfigError as error:
                raise self._about_file(override.value, slot) or error from error
        check_kind(value, slot.hint)
        with history.custom_location(lambda: here):
            slot.set(value)
        reachable = {id(leaf.owner) for leaf in leaves(self._recipe)}
        for earlier, edited in self._edits:
            if id(edited.owner) not in reachable:
                raise ConfigError(f"discards the earlier {earlier.text}; put this one first")
        self._edits.append((override, slot))

    def _value(self, text: str, slot: Slot, here: history.Location) -> Any:
        make = self._names(here)
        if text.startswith("@"):
            return coerce(self._file(text[1:]), slot.hint_for_file, make)
        given = typed(text)
        if isinstance(slot.hint, Unevaluated) or (isinstance(slot.value, fdl.Buildable) and slot.hint is Any):
            return self._unannotated(given, slot, make)
        if given == "" and slot.hint is Any and isinstance(given, Bare):
            raise ConfigError("expects a value; for an empty text write \"''\"")
        if isinstance(slot.value, fdl.Buildable) and isinstance(given, Bare) and slot.wants_name(given):
            try:
                return make(given)
            except _UnknownNameError:
                return coerce(given, slot.hint, make)  # 'auto' for a `Strategy | str`
        return coerce(given, slot.hint, make)

    def _unannotated(self, given: Bare | str, slot: Slot, make: Make) -> Any:
        """Where the annotation does not help: None, a configuration, or what is like the present value."""
        if isinstance(given, Bare):
            if given in ("None", "null") and (slot.hint is Any or slot.value is None):
                return None
            if isinstance(slot.value, fdl.Buildable) and CALL.fullmatch(given):
                return make(given)
        value = literal(given)
        if slot.value is not None and type(value) is type(slot.value):
            return value
        if isinstance(slot.hint, Unevaluated):
            raise ConfigError(f"its type {slot.hint.text} cannot be evaluated; give @file.yaml or set it in Python")
        raise MismatchError(given, fdl.Config, "name a factory, name(argument=...), or a file, @file.yaml")

    def _file(self, name: str) -> Any:
        try:
            text = read_text(user_path(name), MAX_TEXT)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{name!r} cannot be read: {reason}; for a text that starts with @ put it in quotes"
            ) from None
        return reader.load(text, allow=self._allow, source=name)

    def _about_file(self, text: str, slot: Slot) -> ConfigError | None:
        """What to write instead of a file's name where a part of a recipe belongs; None if it is something else."""
        parts = isinstance(slot.value, fdl.Buildable) or any(_is_part(kind) for kind in members(slot.hint))
        if not parts or text.startswith("@") or not _names_file(text):
            return None
        advice = [f"@{text} for a part that is written in it"] if text.endswith((".yaml", ".yml")) else []
        find = self._find
        for name in () if find is None else _READ_FROM_FILES:
            with contextlib.suppress(ConfigError):
                check_kind(fdl.Config(find(name), path=text), slot.hint)  # pyright: ignore[reportOptionalCall]
                advice.append(f"{name}(path={text})")
        said = f"write {' or '.join(advice)}" if advice else "name a class, or a function that makes a part"
        return ConfigError(f"{text!r} is a file; {said}")

    def _names(self, here: history.Location) -> _Names:
        return _Names(self._find, self._allow, here)


@dataclass(frozen=True)
class _Names:
    """What names mean in an edit: `coerce` asks it."""

    find: Find | None
    allow: Sequence[str]
    here: history.Location

    def __call__(self, text: str) -> fdl.Buildable:
        match = CALL.fullmatch(text.strip())
        if not match:
            raise ConfigError(f"{text!r} is not of the form name or name(argument=value)")
        factory = self._factory(match["name"])
        arguments = _arguments(factory, match["arguments"] or "", self)
        if inspect.isclass(factory):
            with history.custom_location(lambda: self.here):
                return fdl.Config(factory, **arguments)
        made = _called(factory, arguments, match["name"])
        if isinstance(made, Recipe):
            raise ConfigError(f"{match['name']} makes a whole recipe, not part of one")
        if not isinstance(made, fdl.Buildable):
            raise ConfigError(f"{match['name']} returned {show(made)}, not a configuration such as fdl.Config")
        return made

    def named(self, reference: str) -> Any:
        return named(reference, self.allow)

    def _factory(self, name: str) -> Callable[..., Any]:
        problems: tuple[str, ...] = (
            f"unknown name {name!r}; yours are written package.module:name, and --allow names them",
        )
        if self.find is not None:
            try:
                return self.find(name)
            except ConfigError as error:
                problems = error.problems
        if "." not in name and ":" not in name:
            raise _UnknownNameError(*problems)
        return self.named(name)


def _is_part(kind: Any) -> bool:
    """Whether a type is a class that a recipe configures, and not one of Python's own."""
    origin = typing.get_origin(kind) or kind
    return inspect.isclass(origin) and origin.__module__.partition(".")[0] not in sys.stdlib_module_names


def _names_file(text: str) -> bool:
    suffixes = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".model", ".safetensors", ".parquet")
    return text.endswith(suffixes) or os.path.exists(text)  # noqa: PTH110  Path raises for a text that is too long


class _UnknownNameError(ConfigError):
    """No factory has the name."""


def _location(override: _Override) -> history.Location:
    return history.Location(f"command line: {override.text}", 0, None)


def _arguments(function: Callable[..., Any], text: str, make: Make) -> dict[str, Any]:
    """The keyword arguments of a call, each read as the annotation of its parameter asks."""
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    arguments: dict[str, Any] = {}
    for argument in split_arguments(text):
        name, equals, value = argument.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ConfigError(f"{argument!r} must be name=value")
        if name in arguments:
            raise ConfigError(f"{name} is given twice")
        if name not in names and not open_ended:
            raise ConfigError(unknown(f"argument of {function.__name__}", name, names))
        hint = parameter_hint(function, name) if name in names else Any
        try:
            given = typed(value.strip())
            arguments[name] = literal(given) if isinstance(hint, Unevaluated) else coerce(given, hint, make)
        except ConfigError as error:
            raise ConfigError(*(f"{name}: {problem}" for problem in error.problems)) from error
    return arguments


def _called(factory: Callable[..., Any], arguments: dict[str, Any], name: str) -> Any:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error
    try:
        return factory(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def _computed(override: _Override, slot: Slot, make: Make) -> Any:
    """The present value of `slot` with the operator applied, as the annotation asks."""
    now = slot.value
    sign = override.sign
    if now is None or now is fdl.NO_VALUE:
        raise ConfigError(f"{slot.path} is {'not set' if now is fdl.NO_VALUE else 'None'}; use = first")
    if sign == "+" and isinstance(now, str):
        return now + str(typed(override.value))
    if sign == "+" and isinstance(now, (list, tuple)):
        return _extended(override, slot, make)
    if isinstance(now, bool) or not isinstance(now, (int, float)):
        raise ConfigError(f"{sign}= needs a number{', a list or a text' if sign == '+' else ''}, not {show(now)}")
    operand = literal(Bare(override.value))
    if isinstance(operand, bool) or not isinstance(operand, (int, float)):
        raise MismatchError(Bare(override.value), float)
    try:
        result = _OPERATORS[sign](now, operand)
    except (ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{show(now)} {sign} {show(operand)}: {error}") from error
    if isinstance(now, int) and isinstance(result, float):
        if not result.is_integer():
            raise ConfigError(
                f"{show(now)} {sign} {show(operand)} is {result}, not an int like the present value; use ="
            )
        # Exactly: a large int does not survive the way through a float.
        result = now // operand if sign == "/" and isinstance(operand, int) else int(result)
    return result if slot.hint is Any or isinstance(slot.hint, Unevaluated) else coerce(result, slot.hint, make)


def _extended(override: _Override, slot: Slot, make: Make) -> Any:
    """The list or tuple with the value's members at its end, or with the value itself if it is not a list of them."""
    now, given = slot.value, typed(override.value)
    hint = slot.list_hint
    try:
        more = coerce(given, list[hint], make)
    except ConfigError:
        try:
            more = [coerce(given, hint, make)]
        except MismatchError:
            raise MismatchError(given, list[hint]) from None
    return type(now)([*now, *more])
