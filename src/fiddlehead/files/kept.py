"""Keeps results from run to run in a JSON file of the cache folder, by the conditions they depend on."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from fiddlehead.files.paths import cache_folder

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
"""A file's size, time of change and inode."""
_SETTLED_SECONDS = 2.0


def stamp(file: Path) -> Stamp:
    """A stamp of a file that shows, without reading the file, whether it has changed."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def settled(*stamps: Stamp) -> bool:
    """Whether the stamps are old enough to be reliable: a change right after a stamp can have the same time."""
    return all(time.time() - changed / 1e9 > _SETTLED_SECONDS for _, changed, _ in stamps)


def read(name: str) -> dict[str, Any]:
    """All results in the file `name` of the cache folder; none if it cannot be read."""
    path = _path(name)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is begun anew: %s", path, error)
        return {}


def keep(name: str, key: str, outcome: Any) -> None:
    """Adds a result; if the folder cannot be written, the next run computes it again."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**read(name), key: outcome}, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("the outcome is not kept in %s: %s", path, error)


def _path(name: str) -> Path:
    return cache_folder() / name
