"""A saved recipe as plain values, for display: nothing that the recipe names is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError


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
