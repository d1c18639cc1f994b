"""From a configuration to YAML that reads back the same, or an error that lists what cannot be written."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import fiddle as fdl
import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.representer import SafeRepresenter

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.recipe.allowed import is_listed, reference_to, withheld_problem
from fiddlehead.recipe.leaves import holds_configuration, items, join, show
from fiddlehead.recipe.schema import ARGS, FORMAT, PARTIAL, TARGET, Dumper, nameless_keys

_MAP, _SEQ, _STR, _NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "null"))


def dump(value: Any, *, what: str = "recipe") -> str:
    """Writes `value`, a configuration or a plain value, as text.

    Raises:
        ConfigError: with every path whose value cannot be written, and what to do about it.
    """
    writer = _Writer()
    node = writer.node(value, "")
    refuse(writer.problems)
    header = f"# fiddlehead {what}, format {FORMAT}\n"
    return header + yaml.serialize(node, Dumper=Dumper, allow_unicode=True, width=120)


def unlisted(recipe: fdl.Buildable) -> list[str]:
    """The names, ``package.module:name``, that `load` must be allowed to read for `recipe`."""
    writer = _Writer()
    writer.node(recipe, "")
    task = fdl.get_callable(recipe)
    return sorted({reference_to(each) for each in writer.named if not is_listed(each, task=each is task)})


class _Writer:
    """Turns values into YAML nodes and keeps the problems, each with its path."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.named: list[Any] = []
        self._configs: dict[int, Node] = {}
        self._open: set[int] = set()

    def node(self, value: Any, path: str) -> Node:
        if id(value) in self._configs:
            return self._configs[id(value)]
        if id(value) in self._open:
            return self._problem(path, "contains itself")
        nested = isinstance(value, (fdl.Buildable, functools.partial, dict, list, tuple, set))
        if nested:
            self._open.add(id(value))
        try:
            return self._node(value, path)
        except ConfigError as error:
            return self._problem(path, *error.problems)
        finally:
            if nested:
                self._open.discard(id(value))

    def _problem(self, path: str, *problems: str) -> Node:
        self.problems += [Problem(path or "the recipe", message=problem) for problem in problems]
        return ScalarNode(_NULL, "null")

    def _node(self, value: Any, path: str) -> Node:
        if isinstance(value, fdl.Buildable):
            self._configs[id(value)] = node = self._config(value, path)
            return node
        if value is None or type(value) in (bool, int, float, str, bytes):
            return SafeRepresenter().represent_data(value)
        if type(value) in (list, tuple, set):
            members = (
                sorted(value, key=lambda member: (str(type(member)), repr(member))) if type(value) is set else value
            )
            flow = not any(isinstance(member, (dict, fdl.Buildable, functools.partial)) for member in members)
            nodes = [self.node(member, f"{path}[{index}]") for index, member in enumerate(members)]
            return SequenceNode(_SEQ if type(value) is list else f"!{type(value).__name__}", nodes, flow_style=flow)
        if type(value) is dict:
            pairs = [
                (self.node(key, f"{path}[{key!r}]"), self.node(value[key], f"{path}[{name}]"))
                for (name, _), key in zip(items(value), value, strict=True)
            ]
            return MappingNode("!dict" if TARGET in value else _MAP, pairs, flow_style=not pairs)
        if isinstance(value, functools.partial):
            return self._call("!partial", value.func, {**dict(enumerate(value.args)), **value.keywords}, path)
        return self._tagged(value)

    def _plain(self, value: Any, path: str) -> Node:
        if isinstance(value, fdl.Buildable) or holds_configuration(value):
            return self._problem(path, "a configuration inside functools.partial is never built; use fdl.Partial")
        return self.node(value, path)

    def _tagged(self, value: Any) -> Node:
        torch = sys.modules.get("torch")
        if isinstance(value, Enum):
            if getattr(type(value), str(value.name), None) is not value:
                raise ConfigError(f"{value!r} is not a single member of its enum; write it as a number")
            return ScalarNode("!enum", f"{self._reference(type(value)).value}.{value.name}")
        if type(value) is type(Path()):
            return ScalarNode("!path", str(value))
        if torch and isinstance(value, torch.dtype):
            return ScalarNode("!dtype", str(value).removeprefix("torch."))
        if torch and isinstance(value, torch.device):
            return ScalarNode("!device", str(value))
        if torch and isinstance(value, torch.Tensor):
            raise ConfigError(
                "a tensor cannot be written; write a configuration that makes it: fdl.Config(torch.full, ...)"
            )
        if inspect.isclass(value) or inspect.isroutine(value):
            return self._reference(value, "!ref")
        if isinstance(value, (str, int, float)):
            plain = next(kind for kind in (str, int, float) if isinstance(value, kind)).__name__
            raise ConfigError(f"a {type(value).__name__} cannot be written; use the plain {plain}({value!r})")
        if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            kind, plain = type(value).__name__, show(value.item())
            raise ConfigError(f"a numpy.{kind} cannot be written; use the plain {plain}, or .item()")
        raise ConfigError(
            f"a live {type(value).__module__}.{type(value).__qualname__} cannot be written; "
            f"use fdl.Config({type(value).__qualname__}, ...) in its place"
        )

    def _config(self, config: fdl.Buildable, path: str) -> Node:
        function = fdl.get_callable(config)
        if isinstance(config, fdl.ArgFactory):
            raise ConfigError("an ArgFactory cannot be written; use fdl.Config or fdl.Partial")
        if any(config.__argument_tags__.values()):
            raise ConfigError("Fiddle's tags cannot be written; set the values and clear the tags")
        arguments = fdl.ordered_arguments(config)
        positions = [key for key in arguments if isinstance(key, int)]
        if positions != nameless_keys(config, len(positions)):
            raise ConfigError("a positional argument before the ones that are set is not set")
        return self._call(_MAP, function, arguments, path, partial=isinstance(config, fdl.Partial))

    def _call(self, tag: str, function: Any, arguments: Mapping[Any, Any], path: str, *, partial: bool = False) -> Node:
        """The mapping for a call of `function`; the keys of positional arguments are their positions."""
        node = self._plain if tag == "!partial" else self.node
        pairs = [(TARGET, self._reference(function))]
        if partial:
            pairs.append((PARTIAL, SafeRepresenter().represent_data(True)))
        positional = [node(item, join(path, key)) for key, item in arguments.items() if isinstance(key, int)]
        if positional:
            pairs.append((ARGS, SequenceNode(_SEQ, positional)))
        for name, item in arguments.items():
            if isinstance(name, int):
                continue
            if name in (TARGET, PARTIAL, ARGS):
                raise ConfigError(f"an argument named {name} cannot be written: the name has a meaning of its own")
            withheld, place = withheld_problem(function, name), join(path, name)
            pairs.append((name, self._problem(place, withheld) if withheld else node(item, place)))
        return MappingNode(tag, [(SafeRepresenter().represent_str(key), each) for key, each in pairs], flow_style=False)

    def _reference(self, function: Any, tag: str = _STR) -> Node:
        self.named.append(function)
        return ScalarNode(tag, reference_to(function))
