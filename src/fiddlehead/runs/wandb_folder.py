"""Reads the folder of a run that W&B has recorded offline: `offline-run-*/run-*.wandb`.

The file is a sequence of records in LevelDB's log format, after a header of seven bytes. Each record is a message of
the wandb package, which also decodes it.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe.plain import flat
from fiddlehead.run.history import from_rows
from fiddlehead.run.metric_names import column
from fiddlehead.runs.record import Record

_HEADER = b":W&B"
_HEADER_SIZE, _BLOCK = 7, 32768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
"""The kinds of a piece of a record."""


def read_wandb(path: Path) -> Record:
    """The record in a folder of W&B, or in its `.wandb` file.

    Raises:
        ConfigError: it is not a file of W&B, or the wandb package cannot decode it.
    """
    files = [path] if path.suffix == ".wandb" else sorted(path.glob("run-*.wandb"))
    file = files[0]
    try:
        from google.protobuf.message import DecodeError

        messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

        content = file.read_bytes()
    except ImportError as error:
        raise ConfigError(Problem.in_file(file, f"needs the wandb package to be read: {error}")) from error
    except OSError as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {error.strerror}")) from error
    if not content.startswith(_HEADER):
        raise ConfigError(Problem.in_file(file, "is not a file of W&B: it does not begin with :W&B"))
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    name, problems = file.parent.name, []
    try:
        for text in _records(content):
            message = messages.Record.FromString(text)
            match message.WhichOneof("record_type"):
                case "history":
                    rows.append(_row(message.history))
                case "run":
                    name = message.run.display_name or name
                    config |= _items(message.run.config.update)
                    environment |= {"host": message.run.host}
                    if commit := message.run.git.commit:
                        environment["git"] = {"revision": commit}
                case "config":
                    config |= _items(message.config.update)
                case "environment":
                    told = message.environment
                    gpus = [f"{gpu.name}, {gpu.memory_total / 2**20:.0f} MiB" for gpu in told.gpu_nvidia]
                    environment |= {"python": told.python, "platform": told.os, "gpus": gpus, "cpus": told.cpu_count}
                    if told.git.commit:
                        environment["git"] = {"revision": told.git.commit}
    except (ValueError, DecodeError, AttributeError) as error:
        problems.append(Problem.in_file(file, f"is damaged after {len(rows)} rows: {error}"))
    config.pop("_wandb", None)
    return Record(name, path, from_rows(rows), flat(config), environment, problems=problems)


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a log; a last one that is cut short is left out."""
    place, begun = _HEADER_SIZE, b""
    while place + 7 <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < 7:  # the end of a block is filled up
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        piece = content[place + 7 : place + 7 + size]
        if len(piece) < size:
            return
        place += 7 + size
        if kind == _WHOLE:
            yield piece
        elif kind == _FIRST:
            begun = piece
        elif kind in (_MIDDLE, _LAST):
            begun += piece
            if kind == _LAST:
                yield begun
        elif kind or size:
            raise ValueError(f"a piece of kind {kind} at byte {place}")


def _items(items: Any) -> dict[str, Any]:
    """Keys and values; a nested key names its parts."""
    found = {}
    for item in items:
        key = item.key or ".".join(item.nested_key)
        found[key] = json.loads(item.value_json)
    return found


def _row(history: Any) -> dict[str, Any]:
    """A logged row: its step and its numbers, by the names of the columns in `metrics.csv`."""
    values = {name: value for name, value in _items(history.item).items() if isinstance(value, int | float)}
    own = values.get("trainer/global_step", values.get("_step", history.step.num))  # Lightning's logger counts its own
    kept = {column(name): value for name, value in values.items() if not name.startswith(("_", "trainer/"))}
    return {"step": own, **kept}
