"""What a machine sends of a run stays in the run's folder here."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import mirror


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
