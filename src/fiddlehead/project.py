"""The user's project: the working directory, with `recipes/`, `launch/` and the modules that these import."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

VARIABLE = "FIDDLEHEAD_PROJECT"
"""The environment variable that names the folder in a job, which imports a copy of it."""

_added: list[str] = []


def folder() -> str:
    """Where the user's modules are: what `VARIABLE` says, or else the working directory."""
    return os.environ.get(VARIABLE) or os.getcwd()  # noqa: PTH109  # `sys.path` holds texts


def make_importable() -> None:
    """Lets this process import the user's modules, after all that is installed.

    Called only where the user has asked for code of theirs: a file `csv.py` that lies in the working directory must
    neither take the place of the standard library's nor run because a command looked around.
    """
    if folder() not in sys.path:
        sys.path.append(folder())
        _added.append(folder())


def comes_first(directory: str | os.PathLike[str]) -> bool:
    """Whether this process was started to import from `directory`, as by PYTHONPATH, and did not only come to it."""
    entries = [entry for entry in sys.path if entry and entry not in _added]
    return os.path.realpath(directory) in map(os.path.realpath, entries)


def places(package: str) -> list[str]:
    """The file and the folders that a top-level package is, or would be, imported from; it is not imported here."""
    module = sys.modules.get(package)
    spec: ModuleSpec | None = getattr(module, "__spec__", None)
    if module is None:
        spec = find_spec(package) or PathFinder.find_spec(package, [folder()])
    if spec is None:
        return []
    return [*filter(None, [spec.origin]), *map(os.path.realpath, spec.submodule_search_locations or ())]
