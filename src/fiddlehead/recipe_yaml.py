"""The YAML form of a configuration: readable, exact, and loaded without running anything that it names.

A nested configuration is a mapping with ``_target_: package.module:name``, and ``_partial_: true`` for a Partial;
positional arguments are the list ``_args_``. What YAML has no form for is tagged: ``!dtype bfloat16``,
``!device cuda:0``, ``!path runs``, ``!enum module:Class.MEMBER``, ``!ref module:function``, ``!tuple [1, 2]``,
``!set [1, 2]``, ``!partial {_target_: module:function}``. A configuration used twice is an anchor and an alias.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import fiddle as fdl
import yaml
from fiddle import history
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.representer import SafeRepresenter

from fiddlehead.errors import ConfigError, unknown
from fiddlehead.leaves import items, join
from fiddlehead.references import is_trusted, reference_to, trusted

FORMAT = 1
TARGET, PARTIAL, ARGS = "_target_", "_partial_", "_args_"
MAX_VALUES = 100_000

_HEADER = re.compile(r"#\s*fiddlehead recipe, format (\d+)")
_MAP, _SEQ, _STR, _NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "null"))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def choose_scalar_style(self) -> str:
        """``!dtype bfloat16`` without the quotes that PyYAML puts around every tagged scalar."""
        analysis = self.analysis = self.analysis or self.analyze_scalar(self.event.value)
        plain = analysis.allow_flow_plain if self.flow_level else analysis.allow_block_plain
        if self.event.tag.startswith("!") and plain and not analysis.multiline:
            return ""
        return super().choose_scalar_style()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}


# The core schema of YAML 1.2, in which 1e-3 is a float. What YAML 1.1 or Python would take for a bool, a number, a date
# or None is called ambiguous: reading it is an error, and written texts that look like it are quoted.
_AMBIGUOUS = (
    r"(?i:yes|no|on|off|none|nan|[-+]?inf)|[-+]?0[0-9_]+|[-+]?0[xob][0-9a-fA-F_]+|[-+]?[0-9]+_[0-9_.]*"
    r"|[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?"
)
_FLOAT = (
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
for _tag, _pattern in (
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("null", r"~|null|Null|NULL|"),
    ("int", r"[-+]?(0|[1-9][0-9]*)"),
    ("float", _FLOAT),
    ("merge", r"<<"),
    ("ambiguous", _AMBIGUOUS),
):
    for _schema in (_Dumper, _Loader):
        _schema.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


def dump(value: Any, *, what: str = "recipe") -> str:
    """`value`, a configuration or a plain value, as text.

    Raises ConfigError that lists every path whose value cannot be written, and what to do about it.
    """
    writer = _Writer()
    node = writer.node(value, "")
    if writer.problems:
        raise ConfigError(*writer.problems)
    header = f"# fiddlehead {what}, format {FORMAT}\n"
    return header + yaml.serialize(node, Dumper=_Dumper, allow_unicode=True, width=120)


def load(text: str, *, allow: Sequence[str] = (), source: str = "recipe.yaml") -> Any:
    """The value that `dump` wrote; `source` names the text in errors and in the history of what it sets.

    Only modules of the trusted packages and of `allow` are imported, and nothing is called. Raises ConfigError with
    line and column for each thing that is wrong.
    """
    header = _HEADER.match(text)
    if header and int(header[1]) > FORMAT:
        raise ConfigError(f"{source}: written in format {header[1]}; this version of fiddlehead reads up to {FORMAT}")
    reader = _Reader(tuple(allow), source)
    try:
        root = yaml.compose(text, Loader=_Loader)
        value = reader.value(root, "") if root else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{at}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except _TooMuchError as error:
        raise ConfigError(f"{source}: {error}") from error
    if root is None:
        raise ConfigError(f"{source}: empty")
    if reader.problems:
        raise ConfigError(*reader.problems)
    return value


def untrusted(config: fdl.Buildable) -> set[str]:
    """The top-level modules that `load` must be allowed to import for `config`."""
    writer = _Writer()
    writer.node(config, "")
    return {function.__module__.partition(".")[0] for function in writer.named if not is_trusted(function)}


class _Writer:
    """Turns values into YAML nodes and keeps the problems, each with its path."""

    def __init__(self) -> None:
        self.problems: list[str] = []
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
            return self._problem(path, str(error))
        finally:
            if nested:
                self._open.discard(id(value))

    def _problem(self, path: str, problem: str) -> Node:
        self.problems.append(f"{path or 'the recipe'}: {problem}")
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
            pairs = [_pair(TARGET, self._reference(value.func))]
            if value.args:
                pairs.append(_pair(ARGS, self.node(list(value.args), path)))
            pairs += [_pair(_free(key), self.node(item, join(path, key))) for key, item in value.keywords.items()]
            return MappingNode("!partial", pairs, flow_style=False)
        return self._tagged(value)

    def _tagged(self, value: Any) -> Node:
        torch = sys.modules.get("torch")
        if isinstance(value, Enum):
            if getattr(type(value), str(value.name), None) is not value:
                raise ConfigError(f"{value!r} is no single member of its enum; write it as a number")
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
        pairs = [_pair(TARGET, self._reference(function))]
        if isinstance(config, fdl.Partial):
            pairs.append(_pair(PARTIAL, SafeRepresenter().represent_data(True)))
        arguments = fdl.ordered_arguments(config)
        positions = [key for key in arguments if isinstance(key, int)]
        if positions:
            if positions != _positions(config, len(positions)):
                raise ConfigError("a positional argument before the ones that are set is not set")
            nodes = [self.node(arguments[key], join(path, key)) for key in positions]
            pairs.append(_pair(ARGS, SequenceNode(_SEQ, nodes)))
        pairs += [
            _pair(_free(key), self.node(item, join(path, key)))
            for key, item in arguments.items()
            if isinstance(key, str)
        ]
        return MappingNode(_MAP, pairs, flow_style=False)

    def _reference(self, function: Any, tag: str = _STR) -> Node:
        self.named.append(function)
        return ScalarNode(tag, reference_to(function))


def _pair(key: str, value: Node) -> tuple[Node, Node]:
    return SafeRepresenter().represent_str(key), value


def _free(name: str) -> str:
    if name in (TARGET, PARTIAL, ARGS):
        raise ConfigError(f"an argument named {name} cannot be written: the name has a meaning of its own")
    return name


def _positions(config: fdl.Buildable, count: int) -> list[int]:
    """The keys Fiddle gives to the first `count` arguments that have no name: positional-only ones, then ``*args``."""
    parameters = list(config.__signature_info__.parameters.values())
    keys = [index for index, parameter in enumerate(parameters) if parameter.kind is parameter.POSITIONAL_ONLY]
    start = config.__signature_info__.var_positional_start
    if start is not None:
        keys += range(start, start + max(0, count - len(keys)))
    return keys[:count]


class _TooMuchError(Exception):
    """Aliases of aliases make a short text a huge value."""


class _ProblemError(Exception):
    """Something wrong at one place of the text; the reader notes it and reads on."""


class _Reader:
    """Turns YAML nodes into values and keeps the problems, each with its line, column and path."""

    def __init__(self, allow: tuple[str, ...], source: str) -> None:
        self.problems: list[str] = []
        self._allow = allow
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
            raise _TooMuchError(f"more than {MAX_VALUES} values")
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
                return trusted(text, self._allow)
            case "!enum":
                return self._enum(text)
            case "!dtype" | "!device":
                return _torch_value(tag, text)
        raise _ProblemError(f"unknown tag {tag}")

    def _enum(self, text: str) -> Enum:
        name, _, member = text.rpartition(".")
        kind = trusted(name, self._allow)
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
        function, positional, named = self._call(pairs, path)
        return functools.partial(function, *positional, **named)

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
        named = {}
        for key, item in pairs.items():
            if isinstance(key, str):
                named[key] = self.value(item, join(path, key))
            else:
                self._note(item, path, f"the name of an argument must be a text, not {key!r}")
        return trusted(reference, self._allow), positional, named

    def _config(self, node: Node, pairs: dict[Any, Node], path: str) -> fdl.Buildable | None:
        partial = self.value(pairs.pop(PARTIAL), path) if PARTIAL in pairs else False
        if not isinstance(partial, bool):
            raise _ProblemError(f"{PARTIAL} must be true or false")
        places = dict(pairs)
        function, positional, named = self._call(pairs, path)
        location = history.Location(self._source, node.start_mark.line + 1, None)
        with history.custom_location(lambda: location):
            try:
                config = (fdl.Partial if partial else fdl.Config)(function)
            except (TypeError, ValueError) as error:
                raise _ProblemError(f"{reference_to(function)} cannot be configured: {error}") from error
        positions = _positions(config, len(positional))
        if len(positions) < len(positional):
            raise _ProblemError(
                f"{function.__qualname__} takes {len(positions)} arguments in {ARGS}, not {len(positional)}"
            )
        for key, value in (*zip(positions, positional, strict=True), *named.items()):
            place = places[ARGS if isinstance(key, int) else key]
            location = history.Location(self._source, place.start_mark.line + 1, None)
            with history.custom_location(lambda location=location: location):
                self._set(config, key, value, place, path)
        return config

    def _set(self, config: fdl.Buildable, key: str | int, value: Any, place: Node, path: str) -> None:
        if isinstance(key, int):
            config._arguments_set_value(key, value)  # item assignment cannot add to *args one by one
            return
        try:
            setattr(config, key, value)
        except AttributeError:
            names = config.__signature_info__.valid_param_names
            what = f"parameter of {fdl.get_callable(config).__qualname__}"
            self._note(place, join(path, key), unknown(what, key, names))


def _torch_value(tag: str, text: str) -> Any:
    import torch

    if tag == "!dtype":
        dtype = getattr(torch, text, None)
        if isinstance(dtype, torch.dtype):
            return dtype
        names = [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]
        raise _ProblemError(unknown("dtype", text, names))
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise _ProblemError(f"{text!r} is not a device: {error}") from error
