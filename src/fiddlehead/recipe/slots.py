"""Finds the place in a configuration for a path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import fiddle as fdl
from fiddle import daglish

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe.hints import argument_hint, item_hint
from fiddlehead.recipe.leaves import name_of, show
from fiddlehead.recipe.literals import typed
from fiddlehead.recipe.nemo_names import answer, names_at, nemo_hint, nemo_path

_STEP = re.compile(r"\.?(?P<name>\w+)|\[(?P<item>[^\]]*)\]")


@dataclass(frozen=True)
class Slot:
    """An argument of `owner`; with `inside`, a member of that argument, which is a list, tuple or dict.

    `value` is the present value, the default if nothing is set, or NO_VALUE; `hint` is its expected type.
    """

    path: str
    owner: fdl.Buildable
    key: str | int
    inside: tuple[Any, ...]
    value: Any
    hint: Any

    def set(self, value: Any) -> None:
        """Puts `value` there. Containers are copied: a default, or a list that is used elsewhere, must not change."""
        value = _replaced(_argument(self.owner, self.key), self.inside, value)
        if isinstance(self.key, str):
            setattr(self.owner, self.key, value)
        else:
            self.owner[self.key] = value

    def holds(self, other: Slot) -> bool:
        """Whether `other` is the same place, or inside of it."""
        same = self.owner is other.owner and self.key == other.key
        return same and other.inside[: len(self.inside)] == self.inside


def find_slot(root: fdl.Buildable, path: str) -> Slot:
    """The place at `path`; only its last step may lead to something that is not there yet.

    Raises:
        ConfigError: there is no such place; the text has the nearest name, or says why.
    """
    owner, key, inside, value, hint = root, "", (), root, Any
    for match in _STEP.finditer(path):
        at, name, item = path[: match.start()], match["name"], match["item"]
        if isinstance(value, fdl.Buildable):
            if name and not _takes(value, name):
                raise _unknown(root, path, value, name)
            owner, inside = value, ()
            key = name or _position(value, item)
            value, hint = _argument(value, key), argument_hint(value, key)
            continue
        if isinstance(value, dict):
            step = _dict_key(value, name or item)
            present = value.get(step, fdl.NO_VALUE)
        elif isinstance(value, (list, tuple)) and not name:
            step = _index(value, item, at)
            present = value[step]
        else:
            raise _no_field(value, at, name or item, answer(names_at(nemo_path(fdl.get_callable(root), path))))
        value, hint, inside = present, item_hint(hint, value, step), (*inside, step)
    return Slot(path, owner, key, inside, value, hint)


def _takes(config: fdl.Buildable, name: str) -> bool:
    info = config.__signature_info__
    return name in info.valid_param_names or bool(info.has_var_keyword and name not in info.parameters)


def _unknown(root: fdl.Buildable, path: str, config: fdl.Buildable, name: str) -> ConfigError:
    """The error that `config` has no parameter `name`; it offers the places in `root` that `path` may have meant."""
    found = answer(names_at(nemo_path(fdl.get_callable(root), path)))
    if found := found or nemo_hint(fdl.get_callable(config), name):
        return ConfigError(f"{name_of(fdl.get_callable(config))} has no {name}; {found}")
    *above, last = [match["name"] or match["item"] for match in _STEP.finditer(path)]
    places = {
        f"{daglish.path_str(place)}.{last}".removeprefix("."): None
        for value, place in daglish.iterate(root)
        if isinstance(value, fdl.Buildable) and last in value.__signature_info__.valid_param_names
    }
    what = f"parameter of {name_of(fdl.get_callable(config))}"
    if not places:
        return ConfigError(Problem.unknown("", name, what, config.__signature_info__.valid_param_names))
    # Of several, those with the most of what was typed in front.
    shared = {place: len({*above} & {*place.split(".")[:-1]}) for place in places}
    likely = [place for place in places if shared[place] == max(shared.values())]
    return ConfigError(f"unknown {what} {name!r}; did you mean {' or '.join(likely)}?")


def _position(config: fdl.Buildable, item: str) -> int:
    count = len(config[:])
    if not item.isdecimal() or int(item) >= count:
        raise ConfigError(f"{name_of(fdl.get_callable(config))} has {count} positional arguments, none is [{item}]")
    return config.__signature_info__.index_to_key(int(item), config.__arguments__)  # type: ignore[return-value]


def _no_field(value: Any, at: str, name: str, nemo: str) -> ConfigError:
    if nemo:
        return ConfigError(nemo)
    if value is fdl.NO_VALUE:
        return ConfigError(f"{at} is not set; set it whole first: {at}=...")
    kind = show(value) if value is None else f"{show(value)} ({type(value).__name__})"
    advice = f"write {at}[0]" if isinstance(value, (list, tuple)) else f"set it whole first: {at}=..."
    return ConfigError(f"{at} is {kind} and has no field {name!r}; {advice}")


def _argument(config: fdl.Buildable, key: str | int) -> Any:
    arguments = fdl.ordered_arguments(config, include_defaults=True, include_unset=True)
    value = arguments.get(key, fdl.NO_VALUE)
    # What stands for a dataclass's default_factory.
    return fdl.NO_VALUE if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS" else value


def _dict_key(container: dict[Any, Any], text: str) -> Any:
    text = str(typed(text))
    return next((key for key in container if str(key) == text), text)


def _index(container: list[Any] | tuple[Any, ...], text: str, at: str) -> int:
    if re.fullmatch(r"-?\d+", text) and -len(container) <= int(text) < len(container):
        return int(text) % len(container)
    raise ConfigError(f"{at} has {len(container)} members, none is [{text}]; {at}+=... adds one")


def _replaced(container: Any, inside: tuple[Any, ...], value: Any) -> Any:
    """A copy of `container` with `value` at the keys `inside`; `value` itself if there are none."""
    if not inside:
        return value
    key = inside[0]
    if isinstance(container, dict):
        return {**container, key: _replaced(container.get(key), inside[1:], value)}
    changed = _replaced(container[key], inside[1:], value)
    return type(container)([*container[:key], changed, *container[key + 1 :]])
