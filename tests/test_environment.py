"""The record of a run's environment, and what it leaves out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fiddlehead import environment
from fiddlehead.environment import describe_environment, free_main_memory


def git(directory: Path, *arguments: str, stdin: bytes | None = None) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout.decode().strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = tmp_path / "code"
    directory.mkdir()
    git(directory, "init", "--quiet")
    (directory / "train.py").write_text("lr = 1\n")
    (directory / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    (directory / "latin.txt").write_bytes("Käse\n".encode("latin-1"))
    (directory / "data.bin").write_bytes(bytes(range(256)))
    git(directory, "add", ".")
    git(directory, "commit", "--quiet", "-m", "first")
    return directory


def test_a_container_may_take_what_its_limit_leaves(tmp_path: Path) -> None:
    whole = free_main_memory(tmp_path / "nothing")
    assert whole == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    files = {"max": "max", "current": str(2**30), "stat": f"anon 5\ninactive_file {2**29}"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert free_main_memory(tmp_path) == pytest.approx(whole, rel=0.2)
    (tmp_path / "memory.max").write_text(f"{2**30 + 2**20}\n")  # files that were read can be read again
    assert free_main_memory(tmp_path) == 2**20 + 2**29


def test_the_revision_is_recorded(repository: Path) -> None:
    found = describe_environment(repository)["git"]
    assert found == {"revision": git(repository, "rev-parse", "HEAD"), "patch": "", "untracked": [], "left_out": []}


def test_the_patch_makes_a_clean_clone_equal(repository: Path, tmp_path: Path) -> None:
    """Edited, staged and deleted; with other line ends, encodings and no text at all."""
    git(repository, "clone", "--quiet", ".", str(tmp_path / "clone"))
    (repository / "train.py").write_text("lr = 2  # \x0c a form feed is not a line end\n")
    (repository / "windows.txt").write_bytes(b"one\r\nthree\r\n")
    (repository / "latin.txt").write_bytes("Käsekuchen\n".encode("latin-1"))
    (repository / "data.bin").write_bytes(bytes(reversed(range(256))))
    (repository / "new.py").write_text("staged = True\n")
    git(repository, "add", "new.py")
    (repository / "notes.txt").write_text("not added")
    found = json.loads(json.dumps(describe_environment(repository)["git"]))
    assert "+lr = 2" in found["patch"] and found["untracked"] == ["notes.txt"]
    clone = tmp_path / "clone"
    git(clone, "apply", stdin=found["patch"].encode(errors="surrogateescape"))
    for name in ("train.py", "windows.txt", "latin.txt", "data.bin", "new.py"):
        assert (clone / name).read_bytes() == (repository / name).read_bytes(), name


def test_a_folder_inside_the_repository_has_all_of_its_changes(repository: Path) -> None:
    (repository / "inner").mkdir()
    (repository / "train.py").write_text("lr = 3\n")
    assert "+lr = 3" in describe_environment(repository / "inner")["git"]["patch"]


def test_a_huge_patch_is_not_kept(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "MAX_PATCH_BYTES", 100)
    (repository / "train.py").write_text("lr = 2\n" * 100)
    assert describe_environment(repository)["git"]["patch"].startswith("not kept: ")


def test_a_secret_is_not_in_the_patch(repository: Path, tmp_path: Path) -> None:
    """By its name or its content; where only its middle has changed, too, or it is deleted, renamed or in a filter."""
    header, lines = "-----BEGIN " + "PRIVATE KEY-----\n", "".join(f"line {number}\n" for number in range(30))
    for name in (".env", "gone.env", "deploy/id_rsa", "moved.pem"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("token=before\n")
    for name in ("notes.txt", "was_key.txt"):
        (repository / name).write_text(header + lines)
    (repository / ".gitattributes").write_text("*.txt diff=shown\n")
    git(repository, "config", "diff.shown.textconv", "sed s/line/decrypted/")
    git(repository, "add", "--force", ".")
    git(repository, "commit", "--quiet", "-m", "secrets")
    (repository / ".env").write_text("token=after\n")
    (repository / "gone.env").unlink()
    (repository / "deploy" / "id_rsa").write_text("token=after\n")
    git(repository, "mv", "moved.pem", "moved.key")
    (repository / "notes.txt").write_text(header + lines.replace("line 20", "token=after"))
    (repository / "was_key.txt").write_text("token=after")
    (repository / "train.py").write_text("lr = 2\n")
    for directory in (repository, repository / "deploy"):
        found = describe_environment(directory)["git"]
        assert "+lr = 2" in found["patch"] and "token" not in found["patch"] and "decrypted" not in found["patch"]
        assert sorted(found["left_out"]) == [
            ".env", "deploy/id_rsa", "gone.env", "moved.key", "moved.pem", "notes.txt", "was_key.txt"
        ]  # fmt: skip


def test_there_may_be_no_repository_and_no_git(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    assert describe_environment(tmp_path / "plain")["git"] is None
    monkeypatch.setenv("PATH", "")
    found = describe_environment(repository)
    assert found["git"] is None and found["gpus"] == []


def test_packages_and_hardware_are_recorded(tmp_path: Path) -> None:
    found = describe_environment(tmp_path)
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["executable"] == sys.executable
    assert found["cpus"] == os.cpu_count() and found["memory_gib"] > 0.1
    assert json.loads(json.dumps(found)) == found


def test_a_broken_installation_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted pip leaves a folder without metadata."""
    (tmp_path / "half-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert all(describe_environment(tmp_path)["packages"])


def test_environment_variables_are_not_recorded(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    text = json.dumps(describe_environment(repository))
    assert "a-secret-value" not in text and "WANDB_API_KEY" not in text
