"""Locks on files: who holds one, and for how long."""

from __future__ import annotations

import fcntl
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fiddlehead.run import locks


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert not locks.is_taken(file), "there is no such file"
    with file.open("a") as mine, file.open("a") as another:
        assert not locks.is_taken(file)
        assert locks.take(mine)
        assert locks.is_taken(file) and not locks.take(another)
    assert not locks.is_taken(file)


def test_a_lock_is_asked_for_without_writing_and_by_many_at_once(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    file.write_text("content")
    file.chmod(0o444)
    with file.open("rb") as looking:
        command = ["flock", "--shared", "--nonblock", str(looking.fileno())]
        assert subprocess.run(command, pass_fds=[looking.fileno()]).returncode == 0
        assert not locks.is_taken(file)
    with file.open("rb") as mine:
        locks.wait_for(mine)
        assert subprocess.run(["flock", "--nonblock", str(file), "true"]).returncode == 1, "shell scripts see it"
        assert locks.is_taken(file)
    assert file.read_text() == "content"


def test_who_waits_for_a_lock_to_be_free_keeps_nobody_from_seeing_that(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with file.open("w") as mine, ThreadPoolExecutor() as pool:
        locks.wait_for(mine)
        waiting = pool.submit(locks.wait_until_free, file)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        fcntl.flock(mine, fcntl.LOCK_SH)  # as one that waited holds it
        assert waiting.result(timeout=10) is None
        assert not locks.is_taken(file)


def test_what_only_some_systems_have_is_in_one_place() -> None:
    package = Path(locks.__file__).parents[1]
    files = [*package.rglob("*.py"), *(package / "launch").glob("*.py")]  # that is a link, and not followed
    importing = {file.name for file in files if re.search(r"^\s*(import|from) fcntl\b", file.read_text(), re.MULTILINE)}
    assert importing == {"locks.py"}
