"""Checks that a job will find the user's modules: in the shipped copy, or where it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fiddlehead.errors import refuse
from fiddlehead.files import secret_files
from fiddlehead.files.paths import user_path
from fiddlehead.launch.code import HIDDEN, CodeCopy
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.imports import Module, modules_of


def check(names: Iterable[str], copy: CodeCopy, executor: Executor) -> list[str]:
    """Checks that a job will find its modules; returns a warning for each data file that it may not find.

    Args:
        names: the recipe's names, ``package.module:name``; the imports of these modules are checked too.

    Raises:
        ConfigError: the job would not find a module; the message has its file, the reason and what to do.
    """
    mine = modules_of(dict.fromkeys(name.partition(":")[0] for name in names))
    mine = [module for module in mine if not _is_or_is_in(module.name, executor.unshipped)]
    outside = [module for module in mine if _in_tree(module.file, copy.root) is None]
    # A job does not start without this package, wherever its environment has it.
    outside = [module for module in outside if not _is_or_is_in(module.name, ["fiddlehead"])]
    found = _found_by_job({_top(module) for module in outside}, executor)
    problems = []
    for module in mine:
        if module in outside:
            why = "" if _top(module) in found else _why_outside(copy, executor)
        else:
            why = _why_not_shipped(module, copy, executor)
        if why:
            needed = f"{module.importer} imports it" if module.importer else "the recipe names it"
            problems.append(
                f"module {module.name} ({module.file}) is not shipped, and {needed}: {why}; if the job has it anyway, "
                f"or does not need it, set executor.unshipped=[{module.name}]"
            )
    refuse(problems)
    return [line for module in mine for line in _missing_data(module, copy)]


def _missing_data(module: Module, copy: CodeCopy) -> Iterator[str]:
    """The files that a module names relative to its own and that are not shipped."""
    for file in module.data:
        place = _in_tree(file, copy.root)
        if place is not None and not (copy.path / place).exists():
            yield f"{file} is not shipped, and module {module.name} names it: {_reason(file, place, copy)}"


def _top(module: Module) -> str:
    return module.name.partition(".")[0]


def _is_or_is_in(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _in_tree(file: Path, root: Path) -> Path | None:
    """Where a file is in the working tree, as a path from its top; None if it is elsewhere.

    A link in the tree belongs to it, even if it leads outside.
    """
    for folder in reversed(file.parents):
        real = Path(os.path.realpath(folder))
        if real == root or root in real.parents:
            return (real / file.relative_to(folder)).relative_to(root)
    return None


def _why_not_shipped(module: Module, copy: CodeCopy, executor: Executor) -> str:
    """Why the job would not find a module of the working tree, and what to do; "" if it will."""
    place = _in_tree(module.file, copy.root)
    if place is None:
        return ""
    shipped = copy.path / place
    if not shipped.exists():
        return _reason(module.file, place, copy)
    real = Path(os.path.realpath(shipped))
    if not executor.shares_environment and Path(os.path.realpath(copy.path)) not in real.parents:
        return f"a link leads to {real}, where the job does not see it; put the file itself there"
    return ""


def _reason(file: Path, place: Path, copy: CodeCopy) -> str:
    """Why a file of the working tree, at `place` in it, is not in the copy, and what to do."""
    parts = (*reversed(place.parents[:-1]), place)
    first = next((part for part in parts if not os.path.lexists(copy.path / part)), None)
    if first is None:
        link = copy.root / next(part for part in parts if (copy.root / part).is_symlink())
        return f"{link} is a link to {os.path.realpath(link)}, which is not shipped; put the file itself there"
    reason = copy.left_out.get(str(first)) or copy.left_out.get(str(place))
    if reason == HIDDEN:
        return f"it is {reason}; `git add -f {file}`"
    if reason:
        return f"it {reason}; give it another name, or take the secret out of it"
    if rule := _ignored_by(copy.root, file, first):
        return f"git ignores it ({rule}); `git add -f {file}`, or take that line out"
    if matched := secret_files.pattern(str(place)):
        return f"it looks like a secret: {matched}; give it another name"
    if any(part.startswith(".") for part in place.parts):
        return "it is hidden, or in a hidden folder; give that another name"
    return "it lies where runs, secrets or a virtual environment are kept; put it elsewhere"


def _ignored_by(root: Path, file: Path, first: Path) -> str:
    """The line of a .gitignore that keeps git from seeing a file, as ``.gitignore:3: *.tmp``; "" if none does."""
    for folder, path in ((Path(os.path.realpath(file.parent)), file.name), (root, str(first))):
        command = ["git", "-C", str(folder), "check-ignore", "-v", "-z", "--stdin"]
        try:
            answer = subprocess.run(command, input=os.fsencode(path), capture_output=True).stdout
        except OSError:
            return ""
        source, line, pattern, *_ = [*map(os.fsdecode, answer.split(b"\0")), "", "", ""]
        if pattern:
            return f"{source}:{line}: {pattern}"
    return ""


def _why_outside(copy: CodeCopy, executor: Executor) -> str:
    """Why a job would not find a module outside the working tree, and what to do."""
    if executor.shares_environment:
        return (
            f"it lies outside of {copy.root}, and the job's Python does not find it; install it, "
            "or put its folder into PYTHONPATH"
        )
    return (
        f"it lies outside of {copy.root}, and the job runs where it is not; install it there, or move it into the tree"
    )


_FIND = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"


def _found_by_job(names: set[str], executor: Executor) -> Sequence[str]:
    """The packages that the job's interpreter finds by itself; none if this machine does not have that interpreter."""
    if not names or not executor.shares_environment:
        return ()
    python = str(user_path(executor.python)) if executor.python else sys.executable
    environment = {**os.environ, **executor.env_vars, "PYTHONSAFEPATH": "1"}
    try:
        answer = subprocess.run([python, "-c", _FIND, *sorted(names)], capture_output=True, env=environment)
    except OSError:
        return ()
    return answer.stdout.decode(errors="replace").split()
