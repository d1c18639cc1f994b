"""A checkpoint as a folder: it is complete or absent, and is checked when it is read.

`checkpoints/step-00000100/` has

- `model.safetensors`: the parameters, by name
- `optimizer.safetensors`: the optimizer's tensors; only where a run is to go on from it
- `state.json`: everything that is not a tensor, each file's size and CRC-32, and its own

Ranks that write together have `model-00001-of-00008.safetensors` and so on instead, with some of the tensors each; a
tensor is whole, so that how many ranks there were, and how they shared the model, makes no difference to who reads it.
Loading a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from fiddlehead.checkpoints.safetensors_files import FileChecksum, StoredTensor, read_header
from fiddlehead.errors import RunError
from fiddlehead.files import kept
from fiddlehead.files.atomic import sync
from fiddlehead.files.foreign import filled, inside, read_json
from fiddlehead.run.console import say
from fiddlehead.run.team import Team, TeamError

FORMAT_VERSION = 1
STEP, TEMPORARY = "step-", ".writing-"
MAX_STEP = 10**8 - 1
"""The last step whose checkpoint's name has eight digits, so that names are in the order of the steps."""

T = TypeVar("T")
_verified: dict[Path, tuple[float | None, dict[str, kept.Stamp]]] = {}
"""The checkpoints that were verified: when each was saved, and its files' stamps."""


@dataclass(frozen=True)
class _File:
    """What `state.json` says of a file."""

    bytes: int
    crc32: int


class DamagedCheckpointError(RunError):
    """A checkpoint's files are not what was written."""


class CheckpointNotWrittenError(RunError):
    """The disk did not take a checkpoint."""


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into that becomes `path` at the end; on any error, a full disk for one, it is gone.

    Raises:
        CheckpointNotWrittenError: the disk did not take it.
    """
    with _all_or_nothing(path) as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        _become(temporary, path)


def write_together(
    path: Path,
    team: Team,
    write: Callable[[Path], dict[str, FileChecksum]],
    finish: Callable[[Path, dict[str, FileChecksum]], None],
) -> None:
    """As `write_folder`, by all ranks of a team: each writes files of its own, and the first one finishes the folder.

    Args:
        write: writes this rank's files into the folder, and returns what they hold by name.
        finish: is told of the files of all ranks.

    Raises:
        CheckpointNotWrittenError: on every rank, if the disk did not take a file of one.
    """

    def write_andsync(temporary: Path) -> dict[str, FileChecksum]:
        written = write(temporary)
        for name in written:
            sync(temporary / name)
        return written

    def finish_folder(temporary: Path, written: dict[str, FileChecksum]) -> None:
        finish(temporary, written)
        _become(temporary, path)

    with _all_or_nothing(path, first=team.first) as temporary:
        team.all(lambda: temporary.mkdir(parents=True) if team.first else None)
        of_ranks = team.all(lambda: write_andsync(temporary))
        written = {name: file for files in of_ranks for name, file in files.items()}
        team.all(lambda: finish_folder(temporary, written) if team.first else None)


def write_state(folder: Path, state: dict[str, Any], written: Mapping[str, FileChecksum] | None = None) -> None:
    """Writes `state.json`, which vouches for the other files of `folder`.

    Args:
        state: what is not a tensor; `config` and `step` among it.
        written: what files hold where it is known already; they need not be seen from here yet.
    """
    state = state | {"format_version": FORMAT_VERSION, "saved": time.time()}
    files = {file.name: file for file in folder.iterdir() if file.is_file()}
    others = {name: file for name, file in files.items() if name not in (written or {})}
    found = {name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for name, file in others.items()}
    state["files"] = dict(sorted((found | dict(written or {})).items()))
    (folder / "state.json").write_text(json.dumps(state | {"crc32": _state_crc32(state)}, indent=1) + "\n")


def step_folder(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"{STEP}{step:08d}"


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, the highest step first."""
    return sorted(directory.glob(f"{STEP}*"), reverse=True)


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`.

    Raises:
        DamagedCheckpointError: it is missing, is not what was written, or belongs to a newer format.
    """
    try:
        state = read_json(path / "state.json")
        version, written = int(state["format_version"]), state.pop("crc32", None)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:  # the last is of Infinity
        raise DamagedCheckpointError(f"{path}/state.json cannot be read: {error!r}") from error
    if version > FORMAT_VERSION:
        raise DamagedCheckpointError(f"{path} has format {version}, newer than this version's {FORMAT_VERSION}")
    if written != _state_crc32(state):
        raise DamagedCheckpointError(f"{path}/state.json is not what was written: its CRC-32 differs")
    try:  # a checksum is no proof of who wrote it
        for name, file in state["files"].items():
            inside(path, name, path / "state.json")
            filled(_File, file)
    except (KeyError, AttributeError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}/state.json: files: {error}") from error
    return state


def verify(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`, after comparing every file with what was written.

    Files are read once in a process; later, their sizes, times and inodes tell that they are still the same.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or changed.
    """
    state = read_state(path)
    files = state["files"]
    for name, written in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != written["bytes"]:
            raise DamagedCheckpointError(f"{file} has {size} of {written['bytes']} bytes")
    checked = state.get("saved"), {name: kept.stamp(path / name) for name in files}
    if _verified.get(path.resolve()) == checked:
        return state
    with ThreadPoolExecutor(max_workers=8) as readers:
        for name, checksum in zip(files, readers.map(_crc32, (path / name for name in files)), strict=True):
            if checksum != files[name]["crc32"]:
                raise DamagedCheckpointError(f"{path / name} is not what was written: its CRC-32 differs")
    if kept.settled(*checked[1].values()):
        _verified[path.resolve()] = checked
    return state


def verified_by_first(team: Team, look: Callable[[], T]) -> T:
    """What `look` returns on the first rank of a team.

    The checkpoints that this rank has verified are not read again by the others, where these see the same files.

    Raises:
        TeamError: on the others, if `look` raises on the first.
    """
    found, verified = team.all(lambda: (look(), _verified) if team.first else (None, {}))[0]
    _verified.update(verified)
    return found  # pyright: ignore[reportReturnType]


def read_tensors(path: Path, state: Mapping[str, Any], kind: str) -> dict[str, StoredTensor]:
    """A checkpoint's tensors of a kind, "model" or "optimizer", in however many files; `state` is its state."""
    files = [name for name in state["files"] if name.startswith((f"{kind}.", f"{kind}-"))]
    return {name: tensor for file in files for name, tensor in read_header(path / file).items()}


def newest_good(directory: Path) -> Path | None:
    """The newest checkpoint in `directory` whose files are whole; says loudly which ones it passes over."""
    for path in newest_first(directory):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            say(f"WARNING: passing over a damaged checkpoint: {error}")
        else:
            return path
    return None


@contextmanager
def _all_or_nothing(path: Path, *, first: bool = True) -> Iterator[Path]:
    """The name of a folder to make and write; if that fails, it is gone, and only the `first` process deletes it."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")

    def clear() -> None:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)

    clear()
    try:
        yield temporary
    except OSError as error:
        clear()
        raise CheckpointNotWrittenError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, TeamError) as error:  # the former is how safetensors reports a full disk
        clear()
        raise CheckpointNotWrittenError(f"{path}: {error}") from error
    except BaseException:
        clear()
        raise


def _become(temporary: Path, path: Path) -> None:
    """Gives a folder its name, once its files are on the disk."""
    for file in (*temporary.rglob("*"), temporary):
        sync(file)
    replaced = path.with_name(f"{TEMPORARY}replaced-{path.name}")
    if path.exists():  # an earlier attempt wrote this step, and it was damaged since
        path.rename(replaced)
    temporary.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            yield chunk


def _state_crc32(state: dict[str, Any]) -> int:
    """Of the values, so that a reader need not know how they were laid out."""
    return zlib.crc32(json.dumps(state).encode())


def _crc32(file: Path) -> int:
    checksum = 0
    for chunk in _chunks(file):
        checksum = zlib.crc32(chunk, checksum)
    return checksum
