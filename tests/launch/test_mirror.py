"""The data that a remote machine sends stays in the run's folder here."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import mirror
from fiddlehead.launch.shell import Shell
from fiddlehead.run.directory import RunDirectory


def test_what_is_sent_is_stored_where_it_belongs(tmp_path: Path) -> None:
    mirror._store(tmp_path, "logs/rank-1.txt", 0, 7, b"first ")
    mirror._store(tmp_path, "logs/rank-1.txt", 6, 9, b"second")
    assert (tmp_path / "logs" / "rank-1.txt").read_bytes() == b"first second"
    mirror._store(tmp_path, "status", 0, 9, b"{}")
    assert (tmp_path / "status").read_bytes() == b"{}" and (tmp_path / "status").stat().st_mtime == 9


@pytest.mark.parametrize(
    ("name", "link"),
    [("log.txt", "file"), ("status", "file"), ("logs/rank-1.txt", "file"), ("logs/rank-1.txt", "folder")],
)
def test_nothing_is_written_through_a_link(name: str, link: str, tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    run.mkdir()
    home.mkdir()
    target = home / Path(name).name
    target.write_text("mine")
    if link == "file":
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).symlink_to(target)
    else:
        (run / "logs").symlink_to(home)
    with pytest.raises(ConfigError, match="is a link"):
        mirror._store(run, name, 0, 0, b"evil")
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["recipe.yaml", "../x.txt", "logs/../../x.txt", "/etc/passwd", "logs/.txt", "job.sh"])
def test_a_file_that_no_run_has_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which no run has"):
        mirror._store(tmp_path, name, 0, 0, b"evil")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [False, True])
def test_what_is_sent_is_for_the_user_only_and_has_no_secret(before: bool, tmp_path: Path) -> None:
    run, place = RunDirectory(tmp_path / "runs" / "a"), tmp_path / "there" / "a"
    for name in (
        "recipe.yaml",
        "code/train.py",
        "code/.github/ci.yml",
        ".env",
        ".netrc",
        "server.pem",
        "job_id",
        ".lock",
    ):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("x")
    if before:
        place.mkdir(parents=True, mode=0o755)
    mirror.send(Shell(), run, place)
    sent = {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}
    assert sent == {"recipe.yaml", "code/train.py", "code/.github/ci.yml", ".origin"}
    assert place.stat().st_mode & 0o707 == 0o700
