"""A saved recipe as plain values, for display: nothing that the recipe names is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError

MAX_LEAVES = 100_000
"""The most values of a recipe: YAML can repeat a part so often that it would fill the memory."""


def plain_recipe(file: Path) -> dict[str, Any]:
    """A saved recipe as plain nested values, for a logger to show; tagged values become their text.

    Raises:
        ConfigError: the file is not a recipe.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        pass

    def construct(loader: Any, suffix: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return node.value
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_mapping(node, deep=True)

    Plain.add_multi_constructor("!", construct)
    if not file.exists():
        return {}
    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} is not a recipe")
    return loaded


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists, by path; a configuration has its class or function at its own path.

    Raises:
        ConfigError: there are more than `MAX_LEAVES`, or it contains itself.
    """
    found: dict[str, Any] = {}
    try:
        for name, leaf in _leaves(value, path):
            found[name] = leaf
            if len(found) > MAX_LEAVES:
                raise ConfigError(f"has more than {MAX_LEAVES:,} values")
    except RecursionError:
        raise ConfigError("contains itself, or is nested too deep") from None
    return found


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            if key == "_target_":
                yield path or "task", item
            elif key != "_partial_":
                yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
