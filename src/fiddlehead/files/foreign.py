"""Reads files that someone else wrote: only plain files with bounded size, depth and numbers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.numbers import is_number

Made = TypeVar("Made")

MAX_BYTES = 1 << 24
"""The largest size of a file of settings, or of a header."""
MAX_TEXT = 1 << 20
"""The largest size of a file that a person writes."""
_MAX_DEPTH = 64
_MAX_DIGITS = 100  # the state of a random generator has 39


def read_bytes(file: Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a plain file; pipes and devices are not read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a plain file, or has more than `limit` bytes.
    """
    return _read(file, None, limit)


def read_start(file: Path, count: int, limit: int = MAX_BYTES) -> bytes:
    """Reads the first `count` bytes of a plain file, or all if it has fewer; raises as `read_bytes` does."""
    return _read(file, count, limit)


def _read(file: Path, count: int | None, limit: int) -> bytes:
    # Without blocking: opening a pipe would wait for a writer.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a plain file")
        count = found.st_size if count is None else count
        if count > limit:
            raise ValueError(f"it has {count:,} bytes to read; allowed: up to {limit:,}")
        return stream.read(count)


def read_text(file: Path, limit: int = MAX_BYTES) -> str:
    """Reads the UTF-8 text in a plain file; raises as `read_bytes` does, and ValueError if it is not UTF-8."""
    return read_bytes(file, limit).decode("utf-8")


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """Parses a JSON text.

    Args:
        strict: refuse values that Python's `json` reads and other parsers do not: NaN, Infinity, half of a surrogate
            pair.

    Raises:
        ValueError: it is not valid JSON, or has nesting or numbers that no file here needs; a JSONDecodeError says
            where it is not valid.
    """
    try:
        value = json.loads(text, parse_int=_int, parse_constant=_refuse_constant if strict else float)
        if strict and has_half_pair(text, value):
            raise ValueError("not Unicode: half of a surrogate pair")
    except RecursionError:
        raise ValueError(f"nested too deep: more than {_MAX_DEPTH} levels") from None
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
    raise ValueError(f"nested too deep: more than {_MAX_DEPTH} levels")


def has_half_pair(text: str | bytes, value: Any) -> bool:
    """Whether `value`, parsed from the JSON `text`, contains half of a surrogate pair, which JSON can escape."""
    if not ("\\u" in text if isinstance(text, str) else b"\\u" in text):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


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
        raise ConfigError(Problem.in_file(file, f"cannot be read: {reason(error)}")) from error
    if not isinstance(value, dict):
        raise ConfigError(Problem.in_file(file, f"must hold a JSON object, not a {type(value).__name__}"))
    return value


def filled(kind: type[Made], values: Any) -> Made:
    """An instance of a dataclass from a JSON object with its fields: numbers, texts, lists of these, and dataclasses.

    Raises:
        ValueError: it is not an object, lacks a field, has an unknown one, or one that is of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"must be an object, not a {type(values).__name__}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if strange := [name for name in values if name not in known]:
        raise ValueError(Problem.unknown("", strange[0], "field", known))
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
    hints = _hints(kind)
    return kind(**{name: _typed(name, value, hints[name]) for name, value in values.items()})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Converts a JSON value to the type of a field."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if is_dataclass(kind):
            return filled(kind, value)  # type: ignore[type-var]
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_typed(name, each, get_args(kind)[0]) for each in value)
        if isinstance(kind, type) and issubclass(kind, Enum):
            if value in [member.value for member in kind]:
                return kind(value)
        elif (kind is float and is_number(value)) or (type(value) is kind):
            return value
    said = " or ".join("null" if kind is NoneType else str(getattr(kind, "__name__", kind)) for kind in kinds)
    raise ValueError(f"{name}={value!r}: must be {said}")


def inside(folder: Path, name: Any, named_in: Any = None) -> Path:
    """The path of a file in a folder, by a name from a foreign file or a list of known names.

    A link must lead to a file in the folder or, if the folder is a snapshot in the Hub's cache, to one of its blobs.
    The file need not exist.

    Args:
        named_in: the file that has the name, for the error; None means the folder.

    Raises:
        ConfigError: it is not in the folder.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(Problem.in_file(named_in or folder, f"{name!r} is not in the folder"))
    file = folder / name
    try:
        home, target = folder.resolve(), file.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            file.lstat()  # which notices what `resolve` does not
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name too long, or not Unicode
        raise ConfigError(Problem.in_file(file, f"cannot be read: {reason(error)}")) from error
    roots = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        roots.append(home.parents[1] / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise ConfigError(
            Problem.in_file(file, f"is a link that leads out of the folder, to {target}; put the file itself there")
        )
    return file


def reason(error: Exception) -> str:
    """Why a file could not be read, without the name of the file."""
    return getattr(error, "strerror", None) or str(error)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
