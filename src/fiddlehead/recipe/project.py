"""The user's project: the working directory, with `recipes/`, `launch/` and the modules that these import."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "FIDDLEHEAD_PROJECT"
"""The environment variable that names the folder in a job, which imports a copy of it."""

HOME = str(Path(__file__).resolve().parents[2])
"""The folder from which this package is imported."""


def folder() -> str:
    """The folder of the user's modules: the value of `VARIABLE`, or else the working directory."""
    return os.environ.get(VARIABLE) or str(Path.cwd())


def make_importable() -> None:
    """Lets this process import the user's modules, after all that is installed.

    It is called only if the user asked for their own code. A file `csv.py` in the working directory must not replace
    the standard library's, and must not run because a command lists files.
    """
    if folder() not in sys.path:
        sys.path.append(folder())


def comes_first(directory: str | os.PathLike[str]) -> bool:
    """Whether a job imports from `directory` before what is installed: PYTHONPATH has it, or this package is there."""
    listed = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.path.realpath(directory) in (HOME, *map(os.path.realpath, listed))


def places(package: str) -> list[str]:
    """The file and the folders that a top-level package is, or would be, imported from; it is not imported here."""
    module = sys.modules.get(package)
    spec: ModuleSpec | None = getattr(module, "__spec__", None)
    if module is None:
        spec = find_spec(package) or PathFinder.find_spec(package, [folder()])
    if spec is None:
        return []
    return [*filter(None, [spec.origin]), *map(os.path.realpath, spec.submodule_search_locations or ())]
