"""Reading files that someone else wrote: plain files only, of bounded size, depth and numbers."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError

MAX_BYTES = 1 << 24
"""How large a file of settings, or a header, may be."""
_MAX_DEPTH = 64
_MAX_DIGITS = 100  # the state of a random generator has 39


def read_bytes(file: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a plain file; of a pipe or a device nothing is read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a plain file, or has more than `limit` bytes.
    """
    # Without blocking: opening a pipe would wait for someone who writes.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a plain file")
        if found.st_size > limit:
            raise ValueError(f"it has {found.st_size:,} bytes; allowed: up to {limit:,}")
        return stream.read(limit)


def read_text(file: Path, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text in a plain file; raises as `read_bytes` does, and ValueError for what is not UTF-8."""
    return read_bytes(file, limit).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: it is not valid JSON, or has nesting or numbers that no file here needs; a JSONDecodeError says
            where it is not valid.
    """
    try:
        value = json.loads(text, parse_int=_int)
    except RecursionError:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep") from None
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            part
            for each in level
            if isinstance(each, (dict, list))
            for part in (each.values() if isinstance(each, dict) else each)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def read_json(file: Path, limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file; raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(file, limit))


def read_object(file: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it cannot be read, is not valid JSON, or is not an object.
    """
    try:
        value = read_json(file, limit)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: must hold a JSON object, not a {type(value).__name__}")
    return value


def inside(folder: Path, name: Any) -> Path:
    """The file of a folder that a foreign file, or a list of known names, names.

    A link must lead to a file in the folder, or, where the folder is a snapshot in the cache of the Hub, to one of its
    blobs. The file need not be there.

    Raises:
        ConfigError: it is not in the folder.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"{folder}: {name!r} is not the name of a file in the folder")
    file = folder / name
    try:
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle; a name that is too long
        raise ConfigError(f"{file} cannot be read: {reason(error)}") from error
    roots = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        roots.append(home.parents[1] / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise ConfigError(f"{file}: is a link that leads out of the folder, to {target}; put the file itself there")
    return file


def reason(error: Exception) -> str:
    """Why a file could not be read, without the name of the file."""
    return getattr(error, "strerror", None) or str(error)


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
