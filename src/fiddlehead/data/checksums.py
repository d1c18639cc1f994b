"""Checksums of data files, to detect that a run's data has changed; each file is read once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fiddlehead.data.progress import ByteProgress
from fiddlehead.files import kept

FILE = "data_checksums.json"
"""The file in the cache folder with the contents of files, by path, with their size, time and inode."""

Checksums = Mapping[str, Sequence[Sequence[str]]]
"""For each part of the data, such as "train": the name and the SHA-256 of each of its files, in order."""

_AT_ONCE = 1 << 22
_LONG = 1 << 30  # bytes that take some time to read


@dataclass(frozen=True)
class Content:
    """The content of a file: its SHA-256 and, for a token file, the largest token id, and the smallest below 0."""

    sha256: str
    max_id: int = -1
    min_id: int = 0


def content(file: Path, dtype: str | None = None) -> Content:
    """The content of a file. It is read unless an earlier run has read it and its size, time and inode are the same.

    Args:
        dtype: of the token ids, if it is a token file.
    """
    key, stamp = f"{file.resolve()} {dtype}", list(kept.stamp(file))
    known = kept.read(FILE).get(key)
    if known and known["stamp"] == stamp:
        return Content(**known["content"])
    found = _read(file, dtype)
    if kept.settled(kept.stamp(file)):
        kept.keep(FILE, key, {"stamp": stamp, "content": asdict(found)})
    return found


def of_paths(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """The names and checksums of files, and of those in folders; the names are relative to what holds each path."""
    files = [(path, file) for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [(str(file.relative_to(path.parent)), content(file).sha256) for path, file in files if file.is_file()]


def differences(before: Checksums, now: Checksums) -> list[str]:
    """The files that are other than before, or that only one of the two has; empty if the data is the same.

    A file may have another name; the order of the files is that of the training, so that it counts.
    """
    found = []
    for part in dict.fromkeys((*before, *now)):
        old, new = before.get(part, []), now.get(part, [])
        if [sha256 for _, sha256 in old] == [sha256 for _, sha256 in new]:
            continue
        known, present = {sha256 for _, sha256 in old}, {sha256 for _, sha256 in new}
        changed = [f"{part}: {name} is new or changed" for name, sha256 in new if sha256 not in known]
        missing = {name for name, _ in old} - {name for name, _ in new}
        gone = [f"{part}: {name} is missing" for name, sha256 in old if sha256 not in present and name in missing]
        found += changed + gone or [f"{part}: the files are in another order, or another number of times"]
    return found


def _read(file: Path, dtype: str | None) -> Content:
    digest, max_id, min_id, size = hashlib.sha256(), -1, 0, file.stat().st_size
    with (
        file.open("rb") as stream,
        ByteProgress(f"checking {file}, once", size if size >= _LONG else 0, enabled=size >= _LONG) as bar,
    ):
        while chunk := stream.read(_AT_ONCE):
            digest.update(chunk)
            if dtype is not None:
                ids = np.frombuffer(chunk, np.dtype(dtype).newbyteorder("<"))
                max_id, min_id = max(max_id, int(ids.max())), min(min_id, int(ids.min()))
            bar.advance(len(chunk))
    return Content(digest.hexdigest(), max_id, min_id)
