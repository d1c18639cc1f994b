"""From YAML to a configuration; what it names is imported only if it is listed or allowed, and never called."""

from __future__ import annotations

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

from fiddlehead.errors import ConfigError, unknown
from fiddlehead.recipe.coercion import dtype
from fiddlehead.recipe.hints import argument_hint
from fiddlehead.recipe.kinds import check_kind
from fiddlehead.recipe.leaves import join
from fiddlehead.recipe.references import check_argument, is_listed, named, reference_to
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
    """The value that `dump` wrote; `source` names the text in errors and in the history of what it sets.

    Only what is listed, and what `allow` has, is imported, and nothing is called. With `task`, the text is a whole
    recipe, which begins with its task. Raises ConfigError with line and column for each thing that is wrong.
    """
    header = HEADER.match(text)
    if header and int(header[1]) > FORMAT:
        raise ConfigError(f"{source}: written in format {header[1]}; this version of fiddlehead reads up to {FORMAT}")
    reader = _Reader(tuple(allow), source, task=task)
    try:
        root = yaml.compose(text, Loader=Loader)
        value = reader.value(root, "") if root else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{at}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except TooMuchError as error:
        raise ConfigError(f"{source}: {error}") from error
    if root is None:
        raise ConfigError(f"{source}: empty")
    if reader.problems:
        raise ConfigError(*reader.problems)
    return value


class _ProblemError(Exception):
    """Something wrong at one place of the text; the reader notes it and reads on."""


class _Reader:
    """Turns YAML nodes into values and keeps the problems, each with its line, column and path."""

    def __init__(self, allow: tuple[str, ...], source: str, *, task: bool) -> None:
        self.problems: list[str] = []
        self._allow = allow
        self._task = task
        self._source = source
        self._configs: dict[int, Any] = {}
        self._open: set[int] = set()
        self._count = 0

    def value(self, node: Node, path: str) -> Any:
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
        except _ProblemError as problem:
            return self._note(node, path, str(problem))
        except ConfigError as error:
            return self._note(node, path, str(error))
        finally:
            self._open.discard(id(node))

    def _note(self, node: Node, path: str, problem: str) -> None:
        mark = node.start_mark
        where = f"{path}: " if path else ""
        self.problems.append(f"{self._source}:{mark.line + 1}:{mark.column + 1}: {where}{problem}")

    def _value(self, node: Node, path: str) -> Any:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, MappingNode):
            if tag not in ("map", "!dict", "!partial"):
                raise _ProblemError(f"unknown tag {tag} for a mapping")
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
                raise _ProblemError(f"unknown tag {tag} for a list")
            members = [self.value(member, f"{path}[{index}]") for index, member in enumerate(node.value)]
            try:
                return kinds[tag](members)
            except TypeError as error:
                raise _ProblemError(f"cannot be in a set: {error}") from error
        return self._scalar(tag, node)

    def _scalar(self, tag: str, node: Node) -> Any:
        text = node.value
        if tag == "ambiguous":
            raise _ProblemError(
                f"{text} is ambiguous; put quotes around a text, or write true, false or a plain number"
            )
        if tag in ("bool", "null", "int", "float", "str", "binary"):
            try:
                return SafeConstructor().construct_object(node)
            except (KeyError, ValueError, yaml.YAMLError) as error:
                raise _ProblemError(f"{text!r} is not a valid {tag}") from error
        match tag:
            case "!path":
                return Path(text)
            case "!ref":
                return named(text, self._allow)
            case "!enum":
                return self._enum(text)
            case "!dtype" | "!device":
                return _torch_value(tag, text)
        raise _ProblemError(f"unknown tag {tag}")

    def _enum(self, text: str) -> Enum:
        name, _, member = text.rpartition(".")
        kind = named(name, self._allow)
        if not (inspect.isclass(kind) and issubclass(kind, Enum)):
            raise _ProblemError(f"{name} is not an enum")
        if member not in kind.__members__:
            raise _ProblemError(unknown(f"member of {kind.__qualname__}", member, list(kind.__members__)))
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
        for key in by_name:
            check_argument(function, key)
        return functools.partial(function, *positional, **by_name)

    def _call(self, pairs: dict[Any, Node], path: str) -> tuple[Any, list[Any], dict[str, Any]]:
        """The target, the positional and the named arguments of a mapping; all are read before any error counts."""
        if TARGET not in pairs:
            raise _ProblemError(f"{TARGET} is missing")
        reference = self.value(pairs.pop(TARGET), path)
        if not isinstance(reference, str):
            raise _ProblemError(f"{TARGET} must be package.module:name")
        positional = self.value(pairs.pop(ARGS), path) if ARGS in pairs else []
        if not isinstance(positional, list):
            raise _ProblemError(f"{ARGS} must be a list")
        by_name = {}
        for key, item in pairs.items():
            if isinstance(key, str):
                by_name[key] = self.value(item, join(path, key))
            else:
                self._note(item, path, f"the name of an argument must be a text, not {key!r}")
        return named(reference, self._allow, task=self._task and not path), positional, by_name

    def _config(self, node: Node, pairs: dict[Any, Node], path: str) -> fdl.Buildable | None:
        partial = self.value(pairs.pop(PARTIAL), path) if PARTIAL in pairs else False
        if not isinstance(partial, bool):
            raise _ProblemError(f"{PARTIAL} must be true or false")
        places = dict(pairs)
        function, positional, by_name = self._call(pairs, path)
        location = history.Location(self._source, node.start_mark.line + 1, None)
        with history.custom_location(lambda: location):
            try:
                config = (fdl.Partial if partial else fdl.Config)(function)
            except (TypeError, ValueError) as error:
                raise _ProblemError(f"{reference_to(function)} cannot be configured: {error}") from error
        positions = nameless_keys(config, len(positional))
        if len(positions) < len(positional):
            raise _ProblemError(
                f"{function.__qualname__} takes {len(positions)} arguments in {ARGS}, not {len(positional)}"
            )
        for key, value in (*zip(positions, positional, strict=True), *by_name.items()):
            place = places[ARGS if isinstance(key, int) else key]
            location = history.Location(self._source, place.start_mark.line + 1, None)
            with history.custom_location(lambda location=location: location):
                self._set(config, key, value, place, path)
        return config

    def _set(self, config: fdl.Buildable, key: str | int, value: Any, place: Node, path: str) -> None:
        if isinstance(key, int):
            config._arguments_set_value(key, value)  # item assignment cannot add to *args one by one
        else:
            try:
                setattr(config, key, value)
            except AttributeError:
                names = config.__signature_info__.valid_param_names
                what = f"parameter of {fdl.get_callable(config).__qualname__}"
                self._note(place, join(path, key), unknown(what, key, names))
                return
        try:
            check_argument(fdl.get_callable(config), key)
            # What the reader has allowed is theirs to place: it may do what a part does without being a subclass.
            check_kind(value, argument_hint(config, key), is_free=lambda function: not is_listed(function))
        except ConfigError as error:
            self._note(place, join(path, key), str(error))


def _torch_value(tag: str, text: str) -> Any:
    import torch

    if tag == "!dtype":
        try:
            return dtype(text)
        except ConfigError as error:
            raise _ProblemError(str(error)) from error
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise _ProblemError(f"{text!r} is not a device: {error}") from error
