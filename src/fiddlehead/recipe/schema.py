"""The YAML form of a configuration: readable, exact, and loaded without running anything that it names.

A nested configuration is a mapping with ``_target_: package.module:name``, and ``_partial_: true`` for a Partial;
positional arguments are the list ``_args_``. What YAML has no form for is tagged: ``!dtype bfloat16``,
``!device cuda:0``, ``!path runs``, ``!enum module:Class.MEMBER``, ``!ref module:function``, ``!tuple [1, 2]``,
``!set [1, 2]``, ``!partial {_target_: module:function}``. A configuration used twice is an anchor and an alias.
"""

from __future__ import annotations

import re
from typing import Any

import fiddle as fdl
import yaml

FORMAT = 1
TARGET, PARTIAL, ARGS = "_target_", "_partial_", "_args_"
MAX_VALUES = 100_000
MAX_NODES = 20_000
"""The most values in a text. With aliases, they may become up to `MAX_VALUES`."""
MAX_DEPTH = 100
"""The deepest nesting of its values. PyYAML checks every open bracket for every token."""

HEADER = re.compile(r"#\s*fiddlehead recipe, format (\d+)")


class Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012 | as PyYAML declares it

    def choose_scalar_style(self) -> str:
        """Plain ``!dtype bfloat16`` where PyYAML would add quotes, and escapes where it would lose a line separator."""
        event: Any = self.event
        if event.style is None and not event.value.isprintable():
            return '"'
        analysis = self.analysis = self.analysis or self.analyze_scalar(event.value)
        plain = analysis.allow_flow_plain if self.flow_level else analysis.allow_block_plain
        if event.tag.startswith("!") and plain and not analysis.multiline:
            return ""
        return super().choose_scalar_style()


class TooMuchError(yaml.YAMLError):
    """A text has more values than any recipe; a few nested aliases are enough for that."""


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 | as PyYAML declares it
    _nodes = 0
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML's, with limits: PyYAML needs a second for this many values."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES:
            raise TooMuchError(f"more than {MAX_NODES} values")
        if self._depth > MAX_DEPTH:
            raise TooMuchError(f"nested too deeply, in more than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


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
    for _schema in (Dumper, Loader):
        _schema.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


def nameless_keys(config: fdl.Buildable, count: int) -> list[int]:
    """The keys Fiddle gives to the first `count` arguments that have no name: positional-only ones, then ``*args``."""
    parameters = list(config.__signature_info__.parameters.values())
    keys = [index for index, parameter in enumerate(parameters) if parameter.kind is parameter.POSITIONAL_ONLY]
    start = config.__signature_info__.var_positional_start
    if start is not None:
        keys += range(start, start + max(0, count - len(keys)))
    return keys[:count]
