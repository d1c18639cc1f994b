"""A module that the job would not find is refused before the job is submitted, with the reason."""

from __future__ import annotations

import importlib
import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import modules
from fiddlehead.launch.code import ship
from fiddlehead.launch.docker import docker
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.imports import modules_of
from fiddlehead.launch.slurm import slurm

HERE = slurm()
ELSEWHERE = docker("image")


def git(directory: Path, *arguments: str) -> None:
    command = ["git", "-C", str(directory), "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments]
    subprocess.run(command, capture_output=True, check=True)


def write(file: Path, text: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in the working directory, imported from last, whose names no other test has."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "--quiet")
    write(folder / "parts_a" / "__init__.py")
    write(folder / "parts_a" / "optim.py", "import parts_b\n")
    write(folder / "parts_b.py")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield folder  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if name.startswith("parts_"):
            del sys.modules[name]


def problems(executor: Executor = HERE, name: str = "parts_a.optim:Sophia") -> list[str]:
    """What is said of a recipe that names `name`, in the working directory."""
    copy = ship(Path.cwd(), Path.cwd().parent / "run" / "code")
    try:
        modules.check([name], copy, executor)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.fixture(autouse=True)
def run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()


def test_what_is_shipped_is_not_missed(tree: Path) -> None:
    assert problems() == problems(ELSEWHERE) == []
    git(tree, "add", ".")
    importlib.import_module("parts_a.optim")
    assert problems() == problems(ELSEWHERE) == []


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("executor", [HERE, ELSEWHERE], ids=["here", "elsewhere"])
def test_an_ignored_module_is_refused_with_the_line_that_ignores_it(
    tree: Path, executor: Executor, imported: bool
) -> None:
    write(tree / ".gitignore", "# mine\nparts_b*\n")
    if imported:
        importlib.import_module("parts_a.optim")
    (problem,) = problems(executor)
    assert problem.startswith(f"module parts_b ({tree}/parts_b.py) is not shipped, and parts_a.optim imports it: ")
    assert f"(.gitignore:2: parts_b*); `git add -f {tree}/parts_b.py`" in problem
    git(tree, "add", "-f", "parts_b.py")
    assert problems(executor) == []


@pytest.mark.parametrize(
    ("ignored", "names"),
    [
        ("parts_a/", ["parts_a", "parts_a.optim"]),
        ("parts_a/*", ["parts_a", "parts_a.optim"]),
        ("__init__.py", ["parts_a"]),
        ("optim.py", ["parts_a.optim"]),
        ("*.py", ["parts_a", "parts_a.optim", "parts_b"]),
    ],
)
def test_packages_are_refused_with_all_that_is_missing(tree: Path, ignored: str, names: list[str]) -> None:
    write(tree / ".git" / "info" / "exclude", f"{ignored}\n")
    found = problems()
    assert [problem.split()[1] for problem in found] == names
    assert all(f"info/exclude:1: {ignored})" in problem for problem in found)


@pytest.mark.parametrize(
    "line",
    [
        "def build():\n    import parts_b",
        "def build():\n    from parts_b import x",
        "from parts_a import hidden_one",
        "from . import hidden_one",
        "from .hidden_one import *",
        "from .hidden_one import x",
        "try:\n    import parts_b\nexcept ImportError:\n    parts_b = None",
        "import importlib\nimportlib.import_module('parts_b')",
        "from importlib import import_module\nimport_module('.hidden_one', __package__)",
        "class A:\n    async def f(self):\n        if self:\n            import parts_b as b",
    ],
)
def test_imports_of_all_kinds_are_seen(tree: Path, line: str) -> None:
    write(tree / ".gitignore", "parts_b.py\nhidden_one.py\n")
    write(tree / "parts_a" / "hidden_one.py")
    write(tree / "parts_a" / "optim.py", f"{line}\n")
    (problem,) = problems()
    assert "git ignores it" in problem


@pytest.mark.parametrize(
    "line",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import parts_b",
        "if __name__ == '__main__':\n    import parts_b",
        "import numpy, json, not_there\nfrom . import not_there",
        "import_module = 1  # import parts_b",
        "this is not Python",
    ],
)
def test_what_a_job_does_not_import_need_not_be_shipped(tree: Path, line: str) -> None:
    write(tree / ".gitignore", "parts_b.py\n")
    write(tree / "parts_a" / "optim.py", f"{line}\n")
    assert problems() == []


def test_modules_by_computed_names_are_those_that_are_loaded(tree: Path) -> None:
    code = "import importlib\nfor each in ['x']:\n    importlib.import_module('parts_a.' + each)\n"
    write(tree / "parts_a" / "optim.py", code)
    write(tree / "parts_a" / "x.py")
    write(tree / ".gitignore", "x.py\n")
    assert problems() == []
    importlib.import_module("parts_a.optim")
    assert [problem.split()[1] for problem in problems()] == ["parts_a.x"]


def test_a_namespace_package_and_a_compiled_module(tree: Path) -> None:
    suffix = next(iter(importlib.machinery.EXTENSION_SUFFIXES))
    write(tree / "parts_c" / "deep" / "a.py", "from parts_c.deep import fast\n")
    write(tree / "parts_c" / "deep" / f"fast{suffix}")
    assert problems(name="parts_c.deep.a:f") == []
    write(tree / ".gitignore", "*.so\n")
    (problem,) = problems(name="parts_c.deep.a:f")
    assert problem.startswith(f"module parts_c.deep.fast ({tree}/parts_c/deep/fast{suffix})")


def test_a_linked_module_is_found_only_if_the_link_stays_in_the_tree(tree: Path, tmp_path: Path) -> None:
    """A link is shipped as a link: within the tree it leads to the copy, out of it to what a container may not see."""
    write(tmp_path / "lib" / "parts_d.py")
    (tree / "parts_b.py").unlink()
    write(tree / "real.py")
    (tree / "parts_b.py").symlink_to("real.py")
    assert problems() == problems(ELSEWHERE) == []
    (tree / "parts_b.py").unlink()
    (tree / "parts_b.py").symlink_to(tmp_path / "lib" / "parts_d.py")
    assert problems() == []
    (problem,) = problems(ELSEWHERE)
    assert f"a link leads to {tmp_path}/lib/parts_d.py, where the job does not see it" in problem
    (tree / "parts_b.py").unlink()
    (tree / "parts_b.py").symlink_to("../lib/parts_d.py")
    (problem,) = problems()
    assert f"{tree}/parts_b.py is a link to {tmp_path}/lib/parts_d.py, which is not shipped" in problem


def test_a_linked_package_that_is_ignored(tree: Path, tmp_path: Path) -> None:
    write(tmp_path / "lib" / "__init__.py")
    (tree / "parts_e").symlink_to(tmp_path / "lib")
    write(tree / ".gitignore", "parts_e\n")
    (problem,) = problems(name="parts_e:f")
    assert "git ignores it (.gitignore:1: parts_e)" in problem


def test_a_module_beside_the_project(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the job has this environment its Python is asked; it knows PYTHONPATH, and not what a script has added."""
    write(tmp_path / "scripts" / "parts_f.py")
    sys.path.append(str(tmp_path / "scripts"))
    (problem,) = problems(name="parts_f:f")
    assert "lies outside of" in problem and "put its folder into PYTHONPATH" in problem
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "scripts"))
    assert problems(name="parts_f:f") == []
    for executor in (ELSEWHERE, slurm(container="image"), slurm(host="login", remote_dir="/scratch")):
        (problem,) = problems(executor, "parts_f:f")
        assert "the job runs where it is not; install it there" in problem
    assert problems(docker("image", unshipped=["parts_f"]), "parts_f:f") == []


def test_what_is_installed_is_not_missed(tree: Path) -> None:
    """Nor are modules of this package, wherever it is; the environment of the job has both, or it does not start."""
    write(tree / "parts_a" / "optim.py", "import torch, yaml, fiddlehead.training\nfrom fiddlehead import recipe\n")
    assert problems(ELSEWHERE) == []
    write(tree / ".gitignore", ".venv\n")
    write(tree / ".venv" / "lib" / "site-packages" / "parts_g.py")
    sys.path.append(str(tree / ".venv" / "lib" / "site-packages"))
    assert problems(ELSEWHERE, "parts_g:f") == []


def test_a_module_with_a_secret_is_refused_as_one(tree: Path) -> None:
    write(tree / "parts_b.py", 'KEY = """-----BEGIN ' + 'PRIVATE KEY-----"""\n')
    (problem,) = problems()
    assert "it has a private key in it; give it another name, or take the secret out of it" in problem


def test_without_git_the_modules_in_hidden_folders_are_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plain"
    write(folder / "parts_h.py", "import parts_i\n")
    write(folder / ".lib" / "parts_i.py")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder), str(folder / ".lib")])
    (problem,) = problems(name="parts_h:f")
    assert "it is hidden, or in a hidden folder" in problem


def test_a_module_of_a_submodule(tree: Path) -> None:
    write(tree / "vendor" / "parts_j.py")
    git(tree / "vendor", "init", "--quiet")
    sys.path.append(str(tree / "vendor"))
    assert problems(name="parts_j:f") == []
    write(tree / "vendor" / ".gitignore", "parts_j.py\n")
    (problem,) = problems(name="parts_j:f")
    assert "(.gitignore:1: parts_j.py)" in problem


def test_a_data_file_that_a_module_names_is_said(tree: Path) -> None:
    lines = (
        "from pathlib import Path\nimport os\n"
        "A = Path(__file__).with_name('a.json')\nB = Path(__file__).parent / 'data' / 'b.json'\n"
        "C = os.path.join(os.path.dirname(__file__), 'data', 'c.json')\nD = 'tracked.json'\nE = 'absent.json'\n"
    )
    write(tree / "parts_b.py", lines)
    for name in ("a.json", "data/b.json", "data/c.json", "tracked.json", "unnamed.json"):
        write(tree / name)
    write(tree / ".gitignore", "*.json\n!tracked.json\n")
    copy = ship(tree, tree.parent / "run" / "code")
    said = modules.check(["parts_a.optim:f"], copy, HERE)
    assert [line.split()[0] for line in said] == [str(tree / n) for n in ("a.json", "data/b.json", "data/c.json")]
    assert all("module parts_b names it: git ignores it (.gitignore:1: *.json)" in line for line in said)


def test_modules_of_names_what_imports_them(tree: Path) -> None:
    assert [(each.name, each.importer) for each in modules_of(["parts_a.optim", "torch.nn", "json"])] == [
        ("parts_a", ""), ("parts_a.optim", ""), ("parts_b", "parts_a.optim"),
    ]  # fmt: skip
