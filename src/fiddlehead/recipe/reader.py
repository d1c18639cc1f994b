"""Reads YAML into a configuration; names are imported only if they are listed or allowed, and never called."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import fiddle as fdl
import yaml
from fiddle import history
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, SequenceNode

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.recipe.allowed import is_listed, named, reference_to, withheld_problem
from fiddlehead.recipe.hints import argument_hint
from fiddlehead.recipe.kinds import check_kind
from fiddlehead.recipe.leaves import join, name_of
from fiddlehead.recipe.scalars import device, dtype
from fiddlehead.recipe.schema import (
    ARGS,
    FORMAT,
    HEADER,
    MAX_VALUES,
    PARTIAL,
    TARGET,
    Loader,
    TooMuchError,
    nameless_keys,
)


def load(text: str, *, allow: Sequence[str] = (), source: str = "recipe.yaml", task: bool = False) -> Any:
    """Loads the value that `dump` wrote; `source` names the text in errors and in Fiddle's history.

    Only names that are listed or in `allow` are imported, and nothing is called. With `task`, the text is a whole
    recipe, which begins with its task.

    Raises:
        ConfigError: with the line and column of each problem.
    """
    header = HEADER.match(text)
    if header and int(header[1]) > FORMAT:
        said = f"written in format {header[1]}; this version of fiddlehead reads up to {FORMAT}"
        raise ConfigError(Problem.in_file(source, said))
    reader = _Reader(tuple(allow), source, task=task)
    try:
        root = yaml.compose(text, Loader=Loader)
        value = reader.value(root, "") if root else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(Problem.in_file(place, error.problem or error.context or "is not valid YAML")) from error
    except yaml.YAMLError as error:
        raise ConfigError(Problem.in_file(source, str(error))) from error
    except RecursionError as error:
        raise ConfigError(Problem.in_file(source, "nested too deeply")) from error
    if root is None:
        raise ConfigError(Problem.in_file(source, "empty"))
    refuse(reader.problems)
    return value


class _Reader:
    """Turns YAML nodes into values and keeps the problems, each with its line, column and path."""

    def __init__(self, allow: tuple[str, ...], source: str, *, task: bool) -> None:
        self.problems: list[Problem] = []
        self._allow = allow
        self._task = task
        self._source = source
        self._configs: dict[int, Any] = {}
        self._open: set[int] = set()
        self._count = 0

    def value(self, node: Node, path: str) -> Any:
        """What `node` stands for; if something is wrong with it, that is noted, and the value is None."""
        if id(node) in self._configs:
            return self._configs[id(node)]
        if id(node) in self._open:
            return self._note(node, path, "contains itself")
        self._count += 1
        if self._count > MAX_VALUES:
            raise TooMuchError(f"more than {MAX_VALUES} values")
        self._open.add(id(node))
        try:
            return self._value(node, path)
        except ConfigError as error:
            return self._note(node, path, *error.problems)
        finally:
            self._open.discard(id(node))

    def _note(self, node: Node, path: str, *problems: str) -> None:
        place = f"{self._source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        self.problems += [Problem.in_file(place, Problem(path, message=problem)) for problem in problems]

    def _value(self, node: Node, path: str) -> Any:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, MappingNode):
            if tag not in ("map", "!dict", "!partial"):
                raise ConfigError(f"unknown tag {tag} for a mapping")
            pairs = self._pairs(node, path)
            if tag == "!partial":
                return self._partial(pairs, path)
            if tag == "map" and TARGET in pairs:
                config = self._config(node, pairs, path)
                self._configs[id(node)] = config
                return config
            return {key: self.value(item, f"{path}[{key}]") for key, item in pairs.items()}
        if isinstance(node, SequenceNode):
            kinds = {"seq": list, "!tuple": tuple, "!set": set}
            if tag not in kinds:
                raise ConfigError(f"unknown tag {tag} for a list")
            members = [self.value(member, f"{path}[{index}]") for index, member in enumerate(node.value)]
            try:
                return kinds[tag](members)
            except TypeError as error:
                raise ConfigError(f"cannot be in a set: {error}") from error
        return self._scalar(tag, node)

    def _scalar(self, tag: str, node: Node) -> Any:
        text = node.value
        match tag:
            case "ambiguous":
                raise ConfigError(
                    f"{text} is ambiguous; put quotes around a text, or write true, false or a plain number"
                )
            case "bool" | "null" | "int" | "float" | "str" | "binary":
                try:
                    return SafeConstructor().construct_object(node)
                except (KeyError, ValueError, yaml.YAMLError) as error:
                    raise ConfigError(f"{text!r} is not a valid {tag}") from error
            case "!path":
                return Path(text)
            case "!ref":
                return named(text, self._allow)
            case "!enum":
                return self._enum(text)
            case "!dtype":
                return dtype(text)
            case "!device":
                return device(text)
        raise ConfigError(f"unknown tag {tag}")

    def _enum(self, text: str) -> Enum:
        name, _, member = text.rpartition(".")
        kind = named(name, self._allow)
        if not (inspect.isclass(kind) and issubclass(kind, Enum)):
            raise ConfigError(f"{name} is not an enum")
        if member not in kind.__members__:
            raise ConfigError(Problem.unknown("", member, f"member of {kind.__qualname__}", list(kind.__members__)))
        return kind[member]

    def _pairs(self, node: MappingNode, path: str) -> dict[Any, Node]:
        pairs: dict[Any, Node] = {}
        for key_node, item in node.value:
            if key_node.tag.endswith(":merge"):
                self._note(key_node, path, "merge keys (<<) are not read; write the keys out")
                continue
            key = self.value(key_node, path)
            try:
                if key in pairs:
                    self._note(key_node, path, f"duplicate key {key!r}")
                pairs[key] = item
            except TypeError:
                self._note(key_node, path, f"{key!r} cannot be a key")
        return pairs

    def _partial(self, pairs: dict[Any, Node], path: str) -> functools.partial:
        function, positional, by_name = self._call(pairs, path)
        refuse(filter(None, (withheld_problem(function, key) for key in by_name)))
        return functools.partial(function, *positional, **by_name)

    def _call(self, pairs: dict[Any, Node], path: str) -> tuple[Any, list[Any], dict[str, Any]]:
        """The target, the positional and the named arguments of a mapping; all arguments are read before the target."""
        if TARGET not in pairs:
            raise ConfigError(f"{TARGET} is missing")
        reference = self.value(pairs.pop(TARGET), path)
        if not isinstance(reference, str):
            raise ConfigError(f"{TARGET} must be package.module:name")
        positional = self.value(pairs.pop(ARGS), path) if ARGS in pairs else []
        if not isinstance(positional, list):
            raise ConfigError(f"{ARGS} must be a list")
        by_name = {}
        for key, item in pairs.items():
            if isinstance(key, str):
                by_name[key] = self.value(item, join(path, key))
            else:
                self._note(item, path, f"the name of an argument must be a text, not {key!r}")
        return named(reference, self._allow, task=self._task and not path), positional, by_name

    def _config(self, node: Node, pairs: dict[Any, Node], path: str) -> fdl.Buildable:
        partial = self.value(pairs.pop(PARTIAL), path) if PARTIAL in pairs else False
        if not isinstance(partial, bool):
            raise ConfigError(f"{PARTIAL} must be true or false")
        places = dict(pairs)
        function, positional, by_name = self._call(pairs, path)
        with self._source_is(node):
            try:
                config = (fdl.Partial if partial else fdl.Config)(function)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{reference_to(function)} cannot be configured: {error}") from error
        positions = nameless_keys(config, len(positional))
        if len(positions) < len(positional):
            raise ConfigError(f"{name_of(function)} takes {len(positions)} arguments in {ARGS}, not {len(positional)}")
        for key, value in (*zip(positions, positional, strict=True), *by_name.items()):
            place = places[ARGS if isinstance(key, int) else key]
            with self._source_is(place):
                try:
                    _set(config, key, value)
                except ConfigError as error:
                    self._note(place, join(path, key), *error.problems)
        return config

    def _source_is(self, node: Node) -> contextlib.AbstractContextManager[Any]:
        """In this context, Fiddle's history records `node` as the source of what is set."""
        location = history.Location(self._source, node.start_mark.line + 1, None)
        return history.custom_location(lambda: location)


def _set(config: fdl.Buildable, key: str | int, value: Any) -> None:
    function = fdl.get_callable(config)
    if isinstance(key, int):
        config._arguments_set_value(key, value)  # item assignment cannot add to *args one by one
    else:
        try:
            setattr(config, key, value)
        except AttributeError:
            names = config.__signature_info__.valid_param_names
            raise ConfigError(Problem.unknown("", key, f"parameter of {name_of(function)}", names)) from None
    refuse(filter(None, [withheld_problem(function, key)]))
    # A name that was allowed may stand anywhere: it may do what a part does without being a subclass.
    check_kind(value, argument_hint(config, key), is_free=lambda function: not is_listed(function))
