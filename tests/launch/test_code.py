"""The shipped code is the working tree with its uncommitted changes, and nothing else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import code
from fiddlehead.launch.code import CodeCopy, ship, shipped
from fiddlehead.recipe import project
from fiddlehead.run.directory import RunDirectory
from tests.conftest import cpu_seconds


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=T", "-c", "user.email=t@example.org"]
    command += ["-c", "protocol.file.allow=always", *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode().strip()


def write(file: Path, text: str = "x\n") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def repository(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    git(directory, "init", "--quiet")
    write(directory / "train.py", f"{directory.name} = 1\n")
    git(directory, "add", ".")
    git(directory, "commit", "--quiet", "-m", "first")
    return directory


def content(path: Path) -> set[str]:
    """Every file and link below `path`."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    return RunDirectory(tmp_path / "elsewhere" / "a")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return repository(tmp_path / "project")


def test_uncommitted_and_new_files_travel_deleted_and_ignored_ones_do_not(tree: Path, run: RunDirectory) -> None:
    write(tree / "gone.py")
    write(tree / ".gitignore", "*.tmp\ndata/\n")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "second")
    write(tree / "train.py", "edited\n")
    (tree / "gone.py").unlink()
    write(tree / "staged.py")
    git(tree, "add", "staged.py")
    write(tree / "new" / "of two\nlines.py", "new\n")
    write(tree / "x.tmp")
    write(tree / "data" / "tokens.bin")
    copy = ship(tree, run.code)
    assert content(run.code) == {".gitignore", "train.py", "staged.py", "new/of two\nlines.py"}
    assert (run.code / "train.py").read_text() == "edited\n"
    assert (copy.files, copy.bytes) == (4, 12 + 7 + 2 + 4)
    assert copy.revision == git(tree, "rev-parse", "HEAD")
    assert (copy.modified, copy.untracked) == (3, 1)
    described = f"shipped 4 files, 25 bytes, revision {copy.revision[:7]} with 3 modified files and 1 new file"
    assert copy.describe() == described
    assert shipped(run) == copy


def test_links_and_modes_are_kept(tree: Path, run: RunDirectory, tmp_path: Path) -> None:
    write(tree / "real" / "module.py")
    write(tree / "tool.sh").chmod(0o755)
    write(tree / "read_only.py").chmod(0o444)
    (tree / "linked").symlink_to("real")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "outside").symlink_to(tmp_path)
    git(tree, "add", "linked")
    for _ in range(2):  # the second replaces the first, whatever its modes
        ship(tree, run.code)
        assert content(run.code) == {
            "train.py", "real/module.py", "tool.sh", "read_only.py", "linked", "dangling", "outside"
        }  # fmt: skip
        assert [(run.code / name).readlink() for name in ("linked", "dangling", "outside")] == [
            Path("real"), Path("nowhere"), tmp_path
        ]  # fmt: skip
        assert stat.S_IMODE((run.code / "tool.sh").stat().st_mode) & 0o111
        assert not stat.S_IMODE((run.code / "read_only.py").stat().st_mode) & 0o222


def test_a_folder_that_a_link_has_replaced(tree: Path, run: RunDirectory, tmp_path: Path) -> None:
    """Git still lists the files that were in it; what the link points to is not ours."""
    write(tree / "folder" / "inner.py")
    git(tree, "add", ".")
    write(tmp_path / "other" / "inner.py", "another's\n")
    (tree / "folder" / "inner.py").unlink()
    (tree / "folder").rmdir()
    (tree / "folder").symlink_to(tmp_path / "other")
    ship(tree, run.code)
    assert content(run.code) == {"train.py", "folder"} and (run.code / "folder").is_symlink()


def test_submodules_travel_with_their_changes(tree: Path, run: RunDirectory, tmp_path: Path) -> None:
    inner = repository(tmp_path / "inner")
    outer = repository(tmp_path / "outer")
    git(outer, "submodule", "--quiet", "add", str(inner), "deep")
    git(outer, "commit", "--quiet", "-m", "with a submodule")
    git(tree, "submodule", "--quiet", "add", str(outer), "third party")
    git(tree, "submodule", "--quiet", "update", "--init", "--recursive")
    git(tree, "commit", "--quiet", "-m", "with submodules")
    write(tree / "third party" / "deep" / "train.py", "edited\n")
    write(tree / "third party" / "new.py")
    write(tree / "third party" / ".gitignore", "*.tmp\n")
    write(tree / "third party" / "x.tmp")
    repository(tree / "stray")  # nobody has made it a submodule
    git(tree, "submodule", "--quiet", "add", str(inner), "absent")
    git(tree, "submodule", "--quiet", "deinit", "--force", "absent")
    ship(tree, run.code)
    assert content(run.code) == {
        ".gitmodules", "train.py", "stray/train.py",
        "third party/.gitmodules", "third party/train.py", "third party/new.py",
        "third party/deep/train.py",
    }  # fmt: skip
    assert (run.code / "third party" / "deep" / "train.py").read_text() == "edited\n"


def test_runs_and_the_copy_itself_do_not_travel(tree: Path) -> None:
    run = RunDirectory(tree / "runs" / "a")
    write(run.recipe)
    write(tree / "runs" / "b" / "checkpoints" / "large")
    copy = ship(tree, run.code, exclude=[tree / "runs"])
    again = ship(tree, run.code, exclude=[tree / "runs"])
    assert content(run.code) == {"train.py"} and copy == again and again.untracked == 0
    assert sorted(path.name for path in run.path.iterdir()) == ["code", "code.json", "recipe.yaml"]


def test_runs_beside_the_code(tree: Path) -> None:
    """With log.dir=. the code itself is not excluded."""
    run = RunDirectory(tree / "a")
    write(run.recipe)
    ship(tree, run.code, exclude=[tree])
    assert content(run.code) == {"train.py"}


def test_secrets_do_not_travel(tree: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", str(tree / "private"))
    write(tree / "private" / "a-123.sh")
    ship(tree, run.code)
    assert content(run.code) == {"train.py"}


def test_the_whole_repository_travels_from_a_folder_of_it(tree: Path, run: RunDirectory) -> None:
    (tree / "experiments" / "empty").mkdir(parents=True)
    copy = ship(tree / "experiments" / "empty", run.code)
    assert content(run.code) == {"train.py"}
    assert copy.counterpart(tree / "experiments" / "empty") == run.code / "experiments" / "empty"
    assert (run.code / "experiments" / "empty").is_dir()


def test_an_ignored_folder_is_refused(tree: Path, run: RunDirectory) -> None:
    write(tree / ".gitignore", "scratch/\n")
    write(tree / "scratch" / "inner" / "train.py")
    with pytest.raises(ConfigError, match=r"git ignores .*/scratch/inner; launch from elsewhere, or `git init` there"):
        ship(tree / "scratch" / "inner", run.code)


def test_before_the_first_commit(tmp_path: Path, run: RunDirectory) -> None:
    git(tmp_path, "init", "--quiet", "young")
    write(tmp_path / "young" / "train.py")
    copy = ship(tmp_path / "young", run.code)
    assert content(run.code) == {"train.py"}
    assert copy.describe() == "shipped 1 file, 2 bytes, at no git revision"


def test_without_git_it_is_the_folder(tmp_path: Path, run: RunDirectory) -> None:
    folder = tmp_path / "plain"
    for name in (
        "train.py",
        ".env",
        ".hidden",
        "deploy/a.pem",
        "recipes/mine.py",
        ".cache/x",
        "recipes/__pycache__/x.pyc",
        "runs/b/log.txt",
    ):
        write(folder / name)
    write(folder / "venv" / "pyvenv.cfg")
    write(folder / "venv" / "lib" / "large.so")
    write(folder / "conda" / "conda-meta" / "history")
    (folder / "linked").symlink_to("recipes")
    os.mkfifo(folder / "pipe")
    ship(folder, run.code, exclude=[folder / "runs"])
    assert content(run.code) == {"train.py", "recipes/mine.py", "linked"}


def test_hidden_files_are_shipped_only_if_git_tracks_them(tree: Path, run: RunDirectory) -> None:
    write(tree / ".github" / "ci.yml")
    write(tree / ".gitignore", "*.tmp\n")
    git(tree, "add", ".github")
    for name in (".config", ".idea/workspace.xml", "src/.cache/a.py", ".gone.tmp", "new.py"):
        write(tree / name)
    repository(tree / ".cache" / "hub")  # of somebody's downloads
    copy = ship(tree, run.code)
    assert content(run.code) == {".github/ci.yml", "train.py", "new.py"} and copy.untracked == 1
    assert sorted(copy.left_out) == [".config", ".gitignore", ".idea/workspace.xml", "src/.cache/a.py"]
    assert ".config (hidden, and not in git's index)" in copy.describe()
    assert shipped(run) == copy


def test_what_looks_like_a_secret_is_not_shipped_though_git_tracks_it(tree: Path, run: RunDirectory) -> None:
    key = "-----BEGIN RSA " + "PRIVATE KEY-----\nMII\n"
    for name in (".env", "deploy/prod.env", ".netrc", "id_rsa", "a.pem", "credentials.json", ".aws/config"):
        write(tree / name)
    write(tree / "notes.txt", key)
    write(tree / "account.json", f'{{"private_key": "{key.strip()}"}}'.replace("\n", "\\n"))
    git(tree, "add", "--force", ".")
    (tree / "link.txt").symlink_to(".env")
    copy = ship(tree, run.code)
    assert content(run.code) == {"train.py", "link.txt"} and not (run.code / "link.txt").exists()
    assert len(copy.left_out) == 9 and copy.files == 2
    described = copy.describe()
    assert "; left out: " in described and "4 more (code.json lists them)" in described
    assert copy.left_out[".env"] == "looks like a secret: .env*"
    assert copy.left_out["notes.txt"] == "has a private key in it"
    assert "MII" not in "".join(path.read_text() for path in run.path.rglob("*") if path.is_file())


def test_too_much_is_refused_with_the_largest(tree: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MAX_BYTES", 100_000)
    write(tree / "weights.bin", "x" * 150_000)
    for number in range(100):
        write(tree / "images" / f"{number}.png", "x" * 500)
    ship_before = content(run.path)
    with pytest.raises(ConfigError) as refused:
        ship(tree, run.code)
    assert content(run.path) == ship_before == set()
    lines = str(refused.value).splitlines()
    assert f"{tree} has 200 kB in 102 files, and at most 100 kB travel with a run" in lines[0]
    assert ".gitignore" in lines[0]
    assert [line.split(maxsplit=2) for line in lines[1:]] == [
        ["150", "kB", "weights.bin"], ["50", "kB", "images/"], ["12", "bytes", "./"]
    ]  # fmt: skip


def test_git_is_never_guessed_around(tree: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that cannot be read is an error: its ignored files would travel."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(ConfigError, match=r"git cannot read .*dubious ownership"):
        ship(tree, run.code)
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="is in a git repository, but there is no git here"):
        ship(tree, run.code)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_that_cannot_be_read_is_named(tree: Path, run: RunDirectory) -> None:
    write(tree / "private.py").chmod(0)
    with pytest.raises(ConfigError, match=r"private\.py cannot be read: Permission denied"):
        ship(tree, run.code)
    assert content(run.path) == set()


def test_thousands_of_files_take_seconds(tree: Path, run: RunDirectory) -> None:
    for number in range(3000):
        write(tree / f"package{number % 50}" / f"module{number}.py")
    before = cpu_seconds()
    assert ship(tree, run.code).files == 3001
    assert cpu_seconds() - before < 10


def test_what_is_imported_from_the_tree_is_imported_from_the_copy(
    tree: Path, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tree / ".gitignore", ".venv\n")
    write(tree / "src" / "mine" / "__init__.py")  # an editable installation
    write(tree / "flat" / "package" / "__init__.py")  # one that is a hook instead of a path
    write(tree / ".venv" / "lib" / "site-packages" / "installed.py")
    write(tree / "env" / "lib" / "site-packages" / "installed.py")  # this one git does not ignore
    write(tree / "here" / "recipes" / "tiny.py")
    (tmp_path / "way").symlink_to(tree)  # another way to the same place
    outside = write(tmp_path / "outside" / "other.py").parent
    path = [tmp_path / "way" / "src", "", *tree.glob("*/lib/site-packages"), outside]
    monkeypatch.setattr(sys, "path", [str(folder) for folder in path])
    package = types.ModuleType("package")
    package.__file__, package.__path__ = str(tree / "flat" / "package" / "__init__.py"), []
    monkeypatch.setitem(sys.modules, "package", package)
    monkeypatch.chdir(tree / "here")
    copy = ship(Path.cwd(), run.code)
    assert [Path(folder) for folder in copy.python_path()] == [run.code / "src", run.code / "flat"]
    assert copy.counterpart(Path.cwd()) == run.code / "here"


def test_the_working_directory_comes_first_in_a_job_only_where_pythonpath_says_so(
    tree: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tree / "csv.py", "raise RuntimeError")
    monkeypatch.chdir(tree)
    monkeypatch.setattr(sys, "path", ["/usr/lib/python"])
    copy = ship(tree, run.code)
    assert copy.python_path() == []
    project.make_importable()  # as for a recipe of the user's
    module = types.ModuleType("mine")
    module.__file__ = str(tree / "mine.py")
    monkeypatch.setitem(sys.modules, "mine", module)
    assert sys.path[-1] == str(tree) and copy.python_path() == []
    monkeypatch.setattr(sys, "path", [str(tree), "/usr/lib/python"])  # of a script that lies there
    assert copy.python_path() == []
    monkeypatch.setenv("PYTHONPATH", f"/usr/lib/python:{tree}")
    assert copy.python_path() == [str(run.code)]


def test_sizes_are_readable() -> None:
    copies = [CodeCopy(Path(), Path(), Path(), 1000, size) for size in (999, 1_000, 999_400, 999_600, 123_456_789)]
    described = [copy.describe().split(", ")[1] for copy in copies]
    assert described == ["999 bytes", "1 kB", "999 kB", "1 MB", "123 MB"]
