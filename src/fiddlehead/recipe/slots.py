"""The place in a configuration that a path leads to."""

from __future__ import annotations

import collections.abc
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fiddle as fdl
from fiddle import daglish

from fiddlehead.errors import ConfigError, unknown
from fiddlehead.recipe.coercion import CALL
from fiddlehead.recipe.hints import Unevaluated, argument_hint
from fiddlehead.recipe.kinds import item_hint, members
from fiddlehead.recipe.leaves import show
from fiddlehead.recipe.literals import typed

_STEP = re.compile(r"\.?(?P<name>\w+)|\[(?P<item>[^\]]*)\]")


@dataclass(frozen=True)
class Slot:
    """An argument of `owner`, or with `inside` a member of the list, tuple or dict that the argument is.

    `value` is what is there, the default if nothing is set, or NO_VALUE; `hint` is the type it should have.
    """

    path: str
    owner: fdl.Buildable
    key: str | int
    inside: tuple[Any, ...]
    value: Any
    hint: Any

    def set(self, value: Any) -> None:
        """Puts `value` there, in a new container if there is one: a default or another's list must not change."""
        for depth in reversed(range(len(self.inside))):
            container = _argument(self.owner, self.key)
            for key in self.inside[:depth]:
                container = container[key]
            value = _replaced(container, self.inside[depth], value)
        if isinstance(self.key, str):
            setattr(self.owner, self.key, value)
        else:
            self.owner[self.key] = value

    def holds(self, other: Slot) -> bool:
        """Whether `other` is the same place, or inside of it."""
        same = self.owner is other.owner and self.key == other.key
        return same and other.inside[: len(self.inside)] == self.inside

    def wants_name(self, text: str) -> bool:
        """Whether `text`, for a place that holds a configuration, is first of all the name of another one."""
        match = CALL.fullmatch(text)
        callables = any(
            (typing.get_origin(member) or member) in (collections.abc.Callable, type) for member in members(self.hint)
        )
        return bool(match) and text not in ("None", "null") and not (callables and match["arguments"] is None)

    @property
    def hint_for_file(self) -> Any:
        """The type for a value that was read from a file and needs no interpretation where the annotation is none."""
        return Any if isinstance(self.hint, Unevaluated) else self.hint

    @property
    def list_hint(self) -> Any:
        """The type of the members of a list or tuple."""
        return item_hint(self.hint, self.value, 0)


def find_slot(root: fdl.Buildable, path: str) -> Slot:
    """The place at `path`; only its last step may lead to something that is not there yet.

    Raises ConfigError with the nearest name, or with why there is no such place.
    """
    slot: Slot | None = None
    value: Any = root
    for match in _STEP.finditer(path):
        at = path[: match.start()]
        try:
            slot = _step(value, slot, at, match["name"], match["item"], path[: match.end()])
        except _UnknownParameterError as error:
            raise error.found_in(root, path) from None
        value = slot.value
    assert slot is not None, "an override has a path"
    return slot


def _step(value: Any, slot: Slot | None, at: str, name: str | None, item: str | None, path: str) -> Slot:
    if isinstance(value, fdl.Buildable):
        key = _argument_key(value, name, item)
        return Slot(path, value, key, (), _argument(value, key), argument_hint(value, key))
    assert slot is not None, "the root is a Buildable"
    if isinstance(value, dict):
        key = _dict_key(value, name if item is None else item)
        present = value.get(key, fdl.NO_VALUE)
    elif isinstance(value, (list, tuple)) and item is not None:
        key = _index(value, item, at)
        present = value[key]
    elif value is fdl.NO_VALUE:
        raise ConfigError(f"{at} is not set; set it whole first: {at}=...")
    else:
        kind = show(value) if value is None else f"{show(value)} ({type(value).__name__})"
        advice = f"write {at}[0]" if isinstance(value, (list, tuple)) else f"set it whole first: {at}=..."
        raise ConfigError(f"{at} is {kind} and has no field {name or item!r}; {advice}")
    return Slot(path, slot.owner, slot.key, (*slot.inside, key), present, item_hint(slot.hint, value, key))


def _argument_key(config: fdl.Buildable, name: str | None, item: str | None) -> str | int:
    info = config.__signature_info__
    function = getattr(fdl.get_callable(config), "__qualname__", repr(fdl.get_callable(config)))
    if name is None:
        arguments = config[:]
        if not str(item).isdecimal() or int(str(item)) >= len(arguments):
            raise ConfigError(f"{function} has {len(arguments)} positional arguments, none is [{item}]")
        return info.index_to_key(int(str(item)), config.__arguments__)
    if name in info.valid_param_names or (info.has_var_keyword and name not in info.parameters):
        return name
    raise _UnknownParameterError(f"parameter of {function}", name, info.valid_param_names)


class _UnknownParameterError(ConfigError):
    """A configuration's function has no such parameter."""

    def __init__(self, what: str, name: str, allowed: Sequence[str]) -> None:
        super().__init__(unknown(what, name, allowed))
        self.what, self.name = what, name

    def found_in(self, root: fdl.Buildable, typed: str) -> ConfigError:
        """The error that names the places in `root` that have the parameter at the end of the path `typed`, if any."""
        steps = [match["name"] or match["item"] for match in _STEP.finditer(typed)]
        name, above = steps[-1], steps[:-1]
        places = {
            f"{daglish.path_str(path).removeprefix('.')}.{name}".removeprefix("."): None
            for value, path in daglish.iterate(root)
            if isinstance(value, fdl.Buildable) and name in value.__signature_info__.valid_param_names
        }
        if not places:
            return self
        # Of several the ones with the most of what was typed in front.
        shared = {place: len(set(above) & set(place.split(".")[:-1])) for place in places}
        likely = [place for place in places if shared[place] == max(shared.values())]
        return ConfigError(f"unknown {self.what} {self.name!r}; did you mean {' or '.join(likely)}?")


def _argument(config: fdl.Buildable, key: str | int) -> Any:
    arguments = fdl.ordered_arguments(config, include_defaults=True, include_unset=True)
    value = arguments.get(key, fdl.NO_VALUE)
    return fdl.NO_VALUE if repr(value) == "<factory>" else value  # what a dataclass makes its default with


def _dict_key(container: dict[Any, Any], text: str | None) -> Any:
    text = str(typed(text or ""))
    return next((key for key in container if str(key) == text), text)


def _index(container: list[Any] | tuple[Any, ...], text: str, at: str) -> int:
    if re.fullmatch(r"-?\d+", text) and -len(container) <= int(text) < len(container):
        return int(text) % len(container)
    raise ConfigError(f"{at} has {len(container)} members, none is [{text}]; {at}+=... adds one")


def _replaced(container: Any, key: Any, value: Any) -> Any:
    if isinstance(container, dict):
        return {**container, key: value}
    return type(container)([*container[:key], value, *container[key + 1 :]])
