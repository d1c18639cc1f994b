"""Applies the command line's edits to a recipe: ``trainer.max_steps=10 optim.lr*=2 model=tiny(num_layers=2)``."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import os
import re
import typing
from collections import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import fiddle as fdl
from fiddle import history

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.foreign import MAX_TEXT, read_text
from fiddlehead.files.paths import user_path
from fiddlehead.recipe import Recipe, reader
from fiddlehead.recipe.allowed import named
from fiddlehead.recipe.coercion import CALL, coerce
from fiddlehead.recipe.hints import Unevaluated, argument_hint, item_hint, members
from fiddlehead.recipe.kinds import MismatchError, check_kind, is_part
from fiddlehead.recipe.leaves import leaves, show
from fiddlehead.recipe.literals import Bare, literal, split_arguments, typed
from fiddlehead.recipe.nemo_names import nemo_hint
from fiddlehead.recipe.slots import Slot, find_slot

Find = Callable[[str], Callable[..., Any]]

_EDIT = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*|\[[^\]]*\])*)(?P<sign>[-+*/]?)=(?P<value>.*)", re.DOTALL)
_READ_FROM_FILES = ("TokenizerFile",)
"""Parts that are what the file at their `path` says."""
_FILES = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".model", ".safetensors", ".parquet")
_MOST_BITS = 10_000  # Python does not write longer numbers
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def apply_overrides(
    recipe: Recipe, overrides: Iterable[str], *, find: Find | None = None, allow: Sequence[str] = ()
) -> Recipe:
    """Returns a copy of `recipe` with the edits applied in the order given.

    An edit is ``path=value``, or ``path+=value`` and likewise ``-= *= /=`` for numbers; ``+=`` also extends lists and
    texts. A path is dotted names, with ``[0]`` or ``[key]`` for members of lists and dicts. The value is read as the
    parameter's annotation says. Quotes make it a text. ``@file.yaml`` is a file's content. For a configuration,
    ``name`` or ``name(argument=value)`` calls the function that `find` returns for the name, or configures the class.
    ``package.module:name`` must be one of the parts that a recipe file may name, or be in `allow`.

    Raises:
        ConfigError: with the mistakes of all edits. An edit that a later one would discard is a mistake too.
    """
    editor = _Editor(copy.deepcopy(recipe), find, tuple(allow))
    problems: list[str] = []
    for text in overrides:
        try:
            editor.apply(text)
        except ConfigError as error:
            problems += error.of(text).problems
        except RecursionError:
            problems.append(Problem(text, message="nested too deep"))
    refuse(problems)
    return editor.recipe


def call_recipe(function: Callable[..., Any], arguments: str, allow: Sequence[str] = ()) -> Any:
    """What `function` returns for arguments that were typed, ``name=value, ...``, each read as its annotation says.

    They are values and never code.

    Raises:
        ConfigError: the function does not have an argument, or needs one that was not given.
    """
    here = history.Location(f"command line: {function.__name__}({arguments})", 0, None)
    given = _Names(None, tuple(allow), here)._arguments(function, arguments)
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise ConfigError(f"{function.__name__}({arguments}): {error}") from error
    return function(**given)


class _Editor:
    """Applies edits to one recipe and records them, to notice edits that have no effect."""

    def __init__(self, recipe: Recipe, find: Find | None, allow: Sequence[str]) -> None:
        self.recipe = recipe
        self._find = find
        self._allow = allow
        self._edits: list[tuple[str, Slot]] = []

    def apply(self, text: str) -> None:
        match = _EDIT.fullmatch(text)
        if not match:
            raise ConfigError(
                "not of the form path=value, such as trainer.max_steps=10, without spaces around the sign"
            )
        slot = find_slot(self.recipe, match["path"])
        names = _Names(self._find, self._allow, history.Location(f"command line: {text}", 0, None))
        if match["sign"]:
            value = _computed(match["sign"], match["value"], slot, names)
        else:
            for earlier, edited in self._edits:
                if slot.holds(edited):
                    raise ConfigError(f"discards the earlier {earlier}; give only one of them")
            try:
                value = _value(match["value"], slot, names)
            except ConfigError as error:
                raise _about_file(match["value"], slot, names) or error from error
        check_kind(value, slot.hint)
        with history.custom_location(lambda: names.here):
            slot.set(value)
        reachable = {id(leaf.owner) for leaf in leaves(self.recipe)}
        for earlier, edited in self._edits:
            if id(edited.owner) not in reachable:
                raise ConfigError(f"discards the earlier {earlier}; put this one first")
        self._edits.append((text, slot))


@dataclass(frozen=True)
class _Names:
    """What names mean in an edit: `coerce` asks it. `here` is the edit, as the source of what it sets."""

    find: Find | None
    allow: Sequence[str]
    here: history.Location

    def __call__(self, text: str) -> fdl.Buildable:
        match = CALL.fullmatch(text.strip())
        if not match:
            raise ConfigError(f"{text!r} is not of the form name or name(argument=value)")
        name = match["name"]
        factory = self._factory(name)
        arguments = self._arguments(factory, match["arguments"] or "")
        if inspect.isclass(factory):
            with history.custom_location(lambda: self.here):
                return fdl.Config(factory, **arguments)
        try:
            inspect.signature(factory).bind(**arguments)
            made = factory(**arguments)
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"{name}: {error}") from error
        if isinstance(made, Recipe):
            raise ConfigError(f"{name} makes a whole recipe, not part of one")
        if not isinstance(made, fdl.Buildable):
            raise ConfigError(f"{name} returned {show(made)}, not a configuration such as fdl.Config")
        return made

    def named(self, reference: str) -> Any:
        return named(reference, self.allow)

    def _factory(self, name: str) -> Callable[..., Any]:
        error = ConfigError(f"unknown name {name!r}; yours are written package.module:name, and --allow names them")
        if self.find is not None:
            try:
                return self.find(name)
            except ConfigError as found:
                error = found
        if "." not in name and ":" not in name:
            raise _UnknownNameError(*error.problems)
        return self.named(name)

    def _arguments(self, function: Callable[..., Any], text: str) -> dict[str, Any]:
        """The keyword arguments of a call, each read as the annotation of its parameter asks."""
        config = fdl.Config(function)
        info = config.__signature_info__
        arguments: dict[str, Any] = {}
        for argument in split_arguments(text):
            name, equals, value = argument.partition("=")
            name = name.strip()
            if not equals or not name.isidentifier():
                raise ConfigError(f"{argument!r} must be name=value")
            if name in arguments:
                raise ConfigError(f"{name} is given twice")
            if name not in info.valid_param_names and not info.has_var_keyword:
                found = nemo_hint(function, name)
                known = Problem.unknown("", name, f"argument of {function.__name__}", info.valid_param_names)
                raise ConfigError(found or known)
            kind, given = argument_hint(config, name), typed(value.strip())
            try:
                arguments[name] = literal(given) if isinstance(kind, Unevaluated) else coerce(given, kind, self)
            except ConfigError as error:
                raise error.of(name) from error
        return arguments


class _UnknownNameError(ConfigError):
    """No factory has the name."""


def _value(text: str, slot: Slot, names: _Names) -> Any:
    """The value that an edit sets."""
    hint, holds_part = slot.hint, isinstance(slot.value, fdl.Buildable)
    is_evaluated = not isinstance(hint, Unevaluated)
    if text.startswith("@"):
        return coerce(_file(text[1:], names.allow), hint if is_evaluated else Any, names)
    given = typed(text)
    if not is_evaluated or (holds_part and hint is Any):
        return _unannotated(given, slot, names)
    if given == "" and hint is Any and isinstance(given, Bare):
        raise ConfigError("expects a value; for an empty text write \"''\"")
    if holds_part and isinstance(given, Bare) and _is_name_first(given, hint):
        with contextlib.suppress(_UnknownNameError):  # 'auto' for a `Strategy | str`
            return names(given)
    return coerce(given, hint, names)


def _is_name_first(text: str, hint: Any) -> bool:
    """Whether a text, for a place that holds a configuration, is first of all the name of another one."""
    match = CALL.fullmatch(text)
    callables = any((typing.get_origin(kind) or kind) in (abc.Callable, type) for kind in members(hint))
    return bool(match) and text not in ("None", "null") and not (callables and match["arguments"] is None)


def _unannotated(given: Bare | str, slot: Slot, names: _Names) -> Any:
    """The value if the annotation does not help: None, a configuration, or a value like the present one."""
    if isinstance(given, Bare):
        if given in ("None", "null") and (slot.hint is Any or slot.value is None):
            return None
        if isinstance(slot.value, fdl.Buildable) and CALL.fullmatch(given):
            return names(given)
    value = literal(given)
    if slot.value is not None and type(value) is type(slot.value):
        return value
    if isinstance(slot.hint, Unevaluated):
        raise ConfigError(f"its type {slot.hint.text} cannot be evaluated; give @file.yaml or set it in Python")
    raise MismatchError(given, fdl.Config, "name a factory, name(argument=...), or a file, @file.yaml")


def _file(name: str, allow: Sequence[str]) -> Any:
    try:
        text = read_text(user_path(name), MAX_TEXT)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name!r} cannot be read: {reason}; put a text that starts with @ in quotes") from None
    return reader.load(text, allow=allow, source=name)


def _about_file(text: str, slot: Slot, names: _Names) -> ConfigError | None:
    """Advice for a file's name in place of a part of a recipe; None if the value is something else."""
    takes_part = isinstance(slot.value, fdl.Buildable) or any(map(is_part, members(slot.hint)))
    is_file = text.endswith(_FILES) or os.path.exists(text)  # noqa: PTH110  Path raises for a text that is too long
    if not takes_part or text.startswith("@") or not is_file:
        return None
    advice = [f"@{text} for a part that is written in it"] if text.endswith((".yaml", ".yml")) else []
    for name in _READ_FROM_FILES if names.find else ():
        with contextlib.suppress(ConfigError):
            check_kind(fdl.Config(names._factory(name), path=text), slot.hint)
            advice.append(f"{name}(path={text})")
    said = f"write {' or '.join(advice)}" if advice else "name a class, or a function that makes a part"
    return ConfigError(f"{text!r} is a file; {said}")


def _computed(sign: str, text: str, slot: Slot, names: _Names) -> Any:
    """The present value of `slot` with the operator applied, converted as the annotation says."""
    now = slot.value
    if now is None or now is fdl.NO_VALUE:
        raise ConfigError(f"{slot.path} is {'not set' if now is fdl.NO_VALUE else 'None'}; use = first")
    if sign == "+" and isinstance(now, str):
        return now + str(typed(text))
    if sign == "+" and isinstance(now, (list, tuple)):
        return type(now)([*now, *_members(typed(text), item_hint(slot.hint, now, 0), names)])
    if isinstance(now, bool) or not isinstance(now, (int, float)):
        raise ConfigError(f"{sign}= needs a number{', a list or a text' if sign == '+' else ''}, not {show(now)}")
    operand = literal(Bare(text))
    if isinstance(operand, bool) or not isinstance(operand, (int, float)):
        raise MismatchError(Bare(text), float)
    try:
        result = _OPERATORS[sign](now, operand)
    except (ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{show(now)} {sign} {show(operand)}: {error}") from error
    if isinstance(result, int) and result.bit_length() > _MOST_BITS:
        raise ConfigError(f"the result of {sign}= is too large")
    if isinstance(now, int) and isinstance(result, float):
        if not result.is_integer():
            raise ConfigError(
                f"{show(now)} {sign} {show(operand)} is {result}, not an int like the present value; use ="
            )
        # Exactly: a large int does not survive the way through a float.
        result = now // operand if sign == "/" and isinstance(operand, int) else int(result)
    return result if isinstance(slot.hint, Unevaluated) else coerce(result, slot.hint, names)


def _members(given: Bare | str, hint: Any, names: _Names) -> list[Any]:
    """The members that a text adds to a list of `hint`: those of the list that it is, or itself."""
    try:
        return coerce(given, list[hint], names)
    except ConfigError:
        try:
            return [coerce(given, hint, names)]
        except MismatchError:
            raise MismatchError(given, list[hint]) from None
