"""The lock in requirements/ against what pyproject.toml asks for."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]


def read(name: str) -> list[tuple[Requirement, str]]:
    """Each requirement of a file in requirements/, and what follows it: its hashes."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "requirements" / name).read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(Requirement(line.split("--hash")[0]), line.partition("--hash")[2]) for line in lines]


def versions(name: str, python: str) -> dict[str, str]:
    """What a lock installs with a version of Python on Linux, and the PyTorch that goes with it."""
    place = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    place |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    found: dict[str, str] = {}
    for requirement, _ in [*read(name), *read("torch.txt")]:
        if requirement.marker is None or requirement.marker.evaluate({**place, "extra": ""}):
            key = canonicalize_name(requirement.name)
            assert key not in found, f"{key} is locked twice for Python {python}"
            found[key] = re.fullmatch(r"==([^,*]+)", str(requirement.specifier)).group(1)  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["lock.txt", "lock-dev.txt"])
def test_the_lock_has_a_release_within_the_bounds_of_each_direct_dependency(lock: str, python: str) -> None:
    wanted = [*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"]]
    wanted += PROJECT["optional-dependencies"]["dev"] if lock == "lock-dev.txt" else []
    locked = versions(lock, python)
    for requirement in map(Requirement, wanted):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements/{lock}: run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_tests_run_with_the_releases_that_the_image_gets(python: str) -> None:
    run, dev = versions("lock.txt", python), versions("lock-dev.txt", python)
    assert run.items() <= dev.items()


@pytest.mark.parametrize("lock", ["lock.txt", "lock-dev.txt"])
def test_each_locked_release_has_a_hash(lock: str) -> None:
    without = [str(requirement) for requirement, hashes in read(lock) if "sha256:" not in hashes]
    assert not without


def test_only_pytorch_and_its_cuda_libraries_are_left_out_of_the_lock() -> None:
    names = {canonicalize_name(requirement.name) for requirement, _ in read("lock-dev.txt")}
    left_out = {canonicalize_name(requirement.name) for requirement, _ in [*read("torch.txt"), *read("cuda.txt")]}
    assert not names & left_out
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_what_builds_the_package_is_what_the_lock_is_made_from() -> None:
    assert [str(requirement) for requirement, _ in read("build.in")][:1] == PYPROJECT["build-system"]["requires"]


def test_the_image_gets_the_pytorch_of_the_tests() -> None:
    [(pinned, _)] = read("torch.txt")
    argument = re.search(r"^ARG TORCH_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert argument is not None and str(pinned.specifier) == f"=={argument[1]}"


def test_this_python_and_this_pytorch_are_allowed() -> None:
    allowed = {
        name: Requirement(line).specifier for line in PROJECT["dependencies"] if (name := Requirement(line).name)
    }
    assert allowed["torch"].contains(torch.__version__.split("+")[0])
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


def test_make_takes_the_versions_of_python_that_the_package_allows() -> None:
    said = re.search(r"\((\d+), (\d+)\) <= sys.version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert said is not None
    assert PROJECT["requires-python"] == ">={}.{},<{}.{}".format(*said.groups())
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if allowed.contains(f"3.{minor}.5")] == PYTHONS
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3" in line]
    assert named == PYTHONS
