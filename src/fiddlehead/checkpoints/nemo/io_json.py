"""Reads `context/io.json` of NeMo 2.0, Fiddle's own format, as data; nothing that it names is imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import parse_json, read_bytes, reason

_MAX_DEPTH = 16
_ATTRIBUTE = re.compile(r"Attr\(name='(\w+)'\)")


def read_model(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the model and of its config, each with the class as `_target_`, as in `model.yaml`.

    Raises:
        ConfigError: it cannot be read, or has no model.
    """
    try:
        content = parse_json(read_bytes(file))
        root = _value(content["root"], content["objects"], 0)
        model = root.get("model", root)
        config = model.get("config")
        return model, config if isinstance(config, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {reason(error)}")) from error


def _value(node: Any, objects: Any, depth: int) -> Any:
    """A node as dicts, lists and plain values; what is deeper than any model's config is None."""
    if not isinstance(node, dict) or depth > _MAX_DEPTH:
        return None if isinstance(node, dict) else node
    if node["type"] == "leaf":
        return node.get("value")
    if node["type"] == "pyref":
        return {"_target_": f"{node['module']}.{node['name']}"}
    if node["type"] == "ref":
        node = objects[node["key"]]
    kind = node["type"]["name"] if isinstance(node.get("type"), dict) else ""
    if kind in ("tuple", "list"):
        return [_value(item, objects, depth + 1) for _, item in node["items"]]
    if kind not in ("Config", "Partial"):
        return None
    # Only what leads to the config is followed: a file may refer to one object very often.
    names = ((match[1], item) for text, item in node["items"] if (match := _ATTRIBUTE.fullmatch(str(text))))
    wanted = {
        name: _value(item, objects, depth + 1) for name, item in names if depth < 2 or not _is_config(item, objects)
    }
    metadata = objects[node["metadata"]["key"]]["items"]
    made_by = next(item for text, item in metadata if text == "Attr(name='fn_or_cls')")
    return {**wanted, "_target_": f"{made_by['module']}.{made_by['name']}"}


def _is_config(node: Any, objects: Any) -> bool:
    if not isinstance(node, dict) or node.get("type") != "ref":
        return False
    kind = objects[node["key"]].get("type")
    return isinstance(kind, dict) and kind.get("name") in ("Config", "Partial")
