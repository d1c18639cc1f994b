"""Runs on another machine: sends their files there, and fetches the small files that a job writes.

The real run directory is on the job's machine; the one here is a mirror without the checkpoints.
"""

from __future__ import annotations

import base64
import gzip
import io
import os
import re
import shlex
import socket
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePath

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files import secret_files
from fiddlehead.launch.shell import Shell
from fiddlehead.run.directory import RunDirectory

THEIRS = ("checkpoints", "tensorboard", "wandb", "logs", "log.txt", "metrics.csv", "scheduler.txt", "attention.json")
"""The files that the job writes."""
OURS = ("job_id", "stop")
"""Files that are used only here, besides hidden files."""
FETCHED = (
    "status",
    "metrics.csv",
    "log.txt",
    "scheduler.txt",
    "attention.json",
    "plan.json",
    "tokenizer.json",
    "wandb_id",
    "mlflow_id",
)
"""The files to fetch besides `logs`. The status comes first, so nothing of an ended run is missed."""
SMALL = 65536
"""Bytes: a file up to this size is brought back even if it seems to be the same."""


def origin(run: RunDirectory) -> str:
    """Identifies this run among runs of the same name from other machines."""
    return f"{socket.gethostname()}:{run.path}"


def is_taken(shell: Shell, run: RunDirectory, place: Path) -> bool:
    """Whether another run is kept at `place`."""
    mine = f'[ "$(cat {_quoted(place / ".origin")} 2> /dev/null)" = {shlex.quote(origin(run))} ]'
    return shell.succeeds(f"[ -e {_quoted(place / run.recipe.name)} ] && ! {mine}")


def send(shell: Shell, run: RunDirectory, place: Path) -> None:
    """Copies everything that a job needs to `place`, which other users cannot read.

    Raises:
        ConfigError: it cannot be written there.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in sorted(run.path.iterdir()):
            private = path.name.startswith(".") or secret_files.pattern(path.name)
            if path.name not in (*THEIRS, *OURS) and not private:
                tar.add(path, arcname=path.name)
    there = _quoted(place)
    command = (
        f"umask o= && mkdir -p {there} && chmod o= {there} && cd {there} && rm -rf code stop && "
        f"printf '%s\\n' {shlex.quote(origin(run))} > .origin && tar --no-same-owner -xzf -"
    )
    answer = shell.ask(command, packed.getvalue())
    if answer.code:
        message = f"cannot write {place} on {shell.name}: {answer.said}"
        raise ConfigError(Problem("executor.remote_dir", message=message))


def write_secret(shell: Shell, path: PurePath, text: str) -> None:
    """Writes a file that only the user can read, in a folder that only the user can read.

    Raises:
        ConfigError: it cannot be written there.
    """
    new = _quoted(path.with_suffix(".new"))
    command = (
        f"umask 077 && mkdir -p {_quoted(path.parent)} && chmod 700 {_quoted(path.parent)} && "
        f"rm -f {new} && cat > {new} && mv {new} {_quoted(path)}"
    )
    answer = shell.ask(command, os.fsencode(text))
    if answer.code:
        raise ConfigError(Problem("executor.secrets", message=f"cannot write {path} on {shell.name}: {answer.said}"))


def fetch(shell: Shell, places: Mapping[Path, Path]) -> None:
    """Updates the mirrors and passes on requests to stop, with one command for all runs.

    Args:
        places: for each run directory here, its path on the other machine.

    Raises:
        ConfigError: the machine does not answer.
    """
    runs = [RunDirectory(local) for local in places]
    questions = [_question(number, run, places[run.path]) for number, run in enumerate(runs)]
    answer = shell.ask("bash -s", "\n".join([_GIVE, *questions]).encode())
    if answer.code:
        raise ConfigError(Problem("executor.host", shell.host, f"cannot read {shell.name}'s runs: {answer.said}"))
    for line in answer.out.splitlines():
        number, name, start, modified, content = line.split(" ")
        _store(runs[int(number)].path, name, int(start), int(modified), gzip.decompress(base64.b64decode(content)))


_GIVE = (
    """\
give() {  # the run's number, and a file: one line with what of it is new, where that begins, and when it was written
    [ -f "$2" ] || return 0
    local state from=0
    state=$(stat -c %s:%Y "$2") || return 0
    if [ "$state" = "${known[$2]}" ] && [ "${state%%:*}" -gt """
    + f"{SMALL}"
    + """ ]; then return 0; fi
    case $2 in *.txt) from=${known[$2]:-0}; from=${from%%:*} ;; esac
    printf '%s %s %s %s ' "$1" "$2" "$from" "${state#*:}"
    tail -c "+$((from + 1))" "$2" | gzip -c | base64 -w 0
    echo
}"""
)


def _question(number: int, run: RunDirectory, place: Path) -> str:
    """Shell lines that print the new data of a run.

    Files here have the modification times of the originals, so size and time show whether an original has changed. They
    decide nothing about a run's state.
    """
    files = [*(run.path / name for name in FETCHED), *run.logs.glob("*.txt")]
    known = " ".join(
        f"[{shlex.quote(str(file.relative_to(run.path)))}]={file.stat().st_size}:{int(file.stat().st_mtime)}"
        for file in files
        if file.exists()
    )
    stop = ""
    if run.stop_requested_since_submission():
        stop = f"printf '%s\\n' {shlex.quote((run.path / 'stop').read_text())} > .stop.new && mv .stop.new stop\n"
    return (
        f"if cd {_quoted(place)} 2> /dev/null; then\n{stop}unset known; declare -A known=({known})\n"
        f'for file in {" ".join(FETCHED)} logs/*.txt; do give {number} "$file"; done\nfi'
    )


def _store(mirror: Path, name: str, start: int, modified: int, content: bytes) -> None:
    """Stores fetched data in the mirror."""
    if name not in FETCHED and not re.fullmatch(r"logs/[\w-]+\.txt", name):
        raise ConfigError(Problem.in_file(mirror, f"was sent a file called {name!r}, which no run has"))
    file = mirror / name
    if any(
        (mirror / part).is_symlink() for part in ("logs", name)
    ):  # in a folder from elsewhere it could lead anywhere
        message = "is a link or lies in one, and files from another machine are not written there"
        raise ConfigError(Problem.in_file(file, message))
    file.parent.mkdir(exist_ok=True)
    if name.endswith(".txt"):
        with file.open("r+b" if file.exists() else "wb") as stream:
            stream.seek(start)
            stream.write(content)
    else:
        new = file.with_name(f".{file.name}.{os.getpid()}.new")
        new.write_bytes(content)
        new.replace(file)
    os.utime(file, (modified, modified))


def _quoted(path: PurePath) -> str:
    return shlex.quote(str(path))
