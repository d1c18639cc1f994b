"""Secrets: where they are kept, who can read them, and that they reach the job."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import secrets
from fiddlehead.run.directory import RunDirectory

AWKWARD = {
    "PLAIN": "abc",
    "QUOTES": 'it\'s "quoted" `here`',
    "SHELL": "$(touch /tmp/never) $HOME; exit 3 & \\",
    "LINES": "one\ntwo\n\n",
    "lower_case": "  spaces  ",
    "EMPTY": "",
    "BYTES": os.fsdecode(b"\xff\xfe caf\xe9"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", str(tmp_path / "kept" / "secrets"))
    for name in secrets.ALWAYS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    return RunDirectory(tmp_path / "runs" / "a")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_that_are_set_are_collected(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert secrets.collect(()) == {}
    monkeypatch.setenv("HF_TOKEN", "one")
    monkeypatch.setenv("MINE", "")
    assert secrets.collect(["MINE", "HF_TOKEN"]) == {"HF_TOKEN": "one", "MINE": ""}


def test_all_that_are_missing_are_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "there")
    with pytest.raises(ConfigError, match=r"^executor\.secrets: GONE, AWAY are not set in this process; "):
        secrets.collect(["GONE", "MINE", "AWAY"])


def test_values_arrive_as_they_are(run: RunDirectory) -> None:
    file = secrets.write(run, AWKWARD)
    printed = subprocess.run(
        ["bash", "-c", f"set -eu; . {file}; env --null"], capture_output=True, check=True, env={"PATH": os.defpath}
    )
    variables = dict(line.split("=", 1) for line in os.fsdecode(printed.stdout).split("\0") if line)
    assert {name: variables[name] for name in AWKWARD} == AWKWARD


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_user_can_read_secrets(run: RunDirectory, umask: int) -> None:
    before = os.umask(umask)
    try:
        file = secrets.write(run, {"A": "1"})
    finally:
        os.umask(before)
    assert file == secrets.file(run) and (mode(file), mode(file.parent)) == (0o600, 0o700)


def test_secrets_are_never_readable_by_others(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when the file is made nor when it takes the place of one that others could read."""
    file = secrets.write(run, {"A": "1"})
    file.parent.chmod(0o755)
    file.chmod(0o644)
    seen = []

    def watched(descriptor: int, *arguments: object) -> object:
        seen.append((stat.S_IMODE(os.fstat(descriptor).st_mode), mode(file.parent)))
        return fdopen(descriptor, *arguments)  # type: ignore[call-overload]

    fdopen = os.fdopen
    monkeypatch.setattr(os, "fdopen", watched)
    secrets.write(run, {"A": "2"})
    assert seen == [(0o600, 0o700)] and mode(file) == 0o600
    assert file.read_text() == "export A=2\n" and list(file.parent.iterdir()) == [file]


def test_a_link_in_their_place_is_replaced_and_not_followed(run: RunDirectory, tmp_path: Path) -> None:
    secrets.folder().mkdir(parents=True)
    (tmp_path / "trap").write_text("untouched")
    secrets.file(run).symlink_to(tmp_path / "trap")
    assert not secrets.write(run, {"A": "1"}).is_symlink()
    assert (tmp_path / "trap").read_text() == "untouched"


def test_two_runs_of_one_name_have_their_own(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "elsewhere" / "a")
    assert secrets.file(other) != secrets.file(run)
    secrets.write(run, {"A": "1"})
    secrets.write(other, {"A": "2"})
    secrets.remove(other)
    assert secrets.file(run).read_text() == "export A=1\n" and not secrets.file(other).exists()


def test_removing_missing_secrets_is_not_an_error(run: RunDirectory) -> None:
    secrets.remove(run)
    secrets.write(run, {"A": "1"})
    secrets.remove(run)
    secrets.remove(run)
    assert list(secrets.folder().iterdir()) == []


def test_an_impossible_folder_is_an_error(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    secrets.remove(run)
    with pytest.raises(
        ConfigError, match=r"^executor\.secrets: cannot be kept in .*; name a folder in FIDDLEHEAD_SECR"
    ):
        secrets.write(run, {"A": "a-secret-value"})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have another user's folder")
def test_a_folder_of_someone_else_is_an_error(run: RunDirectory) -> None:
    secrets.folder().mkdir(parents=True)
    os.chown(secrets.folder(), 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        secrets.write(run, {"A": "1"})


def test_secrets_are_kept_in_the_home_by_default(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FIDDLEHEAD_SECRETS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert secrets.write(run, {"A": "1"}).parent == tmp_path / ".config" / "fiddlehead" / "secrets"
