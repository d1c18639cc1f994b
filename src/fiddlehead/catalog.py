"""Recipes and executors by name: found by reading files, imported only when called.

The functions of `recipes/*.py` (or `launch/*.py`) in the working directory come first, then the built-in ones;
`package.module:function` names anything importable.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fiddlehead.errors import ConfigError, unknown

_BUILT_IN = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A function that can be named on the command line."""

    name: str
    module: str
    file: Path
    line: int
    summary: str
    task: str
    """For a recipe: the skeleton it starts from, directly or through another recipe."""

    def load(self) -> Callable:
        """Imports the module and returns the function.

        Raises:
            ConfigError: Python finds another package of that name first.
        """
        try:
            return getattr(importlib.import_module(self.module), self.name)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise
            other = getattr(sys.modules[self.module.split(".")[0]], "__file__", "elsewhere")
            hint = f"{other} comes first; an empty {self.file.parent}/__init__.py helps"
            raise ConfigError(f"{self.file} cannot be imported as {self.module}: {hint}") from error


def recipes() -> list[Entry]:
    """Every recipe: a public function that says it returns a `Recipe` and takes no argument it cannot do without."""
    return _scan("recipes", "Recipe")


def executors() -> list[Entry]:
    """Every executor: a public function that says it returns an `Executor`, or a kind of it, or calls one that does."""
    return _scan("launch", "Executor")


def find_recipe(name: str) -> Callable:
    """The recipe function called `name`.

    Raises:
        ConfigError: there is none, or the working directory has two.
    """
    return _find(name, recipes(), "recipe")


def find_executor(name: str) -> Callable:
    """The executor function called `name`.

    Raises:
        ConfigError: there is none, or the working directory has two.
    """
    return _find(name, executors(), "executor")


def find_part(name: str) -> Callable:
    """What `name` can put in place of a part of a recipe: a class for one, or a function that returns its Config.

    The functions are those of `recipes/*.py` that say they return a `Config`; the classes are what the packages of
    models, data and training export.

    Raises:
        ConfigError: there is no such part.
    """
    entries = _scan("recipes", "Config")
    if ":" in name or any(entry.name == name for entry in entries):
        return _find(name, entries, "part of a recipe")
    exported = {}
    for package in ("training", "data", "models"):
        module = importlib.import_module(f"fiddlehead.{package}")
        exported.update(dict.fromkeys(module.__all__, module))
    if name not in exported:
        raise ConfigError(unknown("part of a recipe", name, sorted([*exported, *(entry.name for entry in entries)])))
    return getattr(exported[name], name)


def import_by_path(path: str) -> Callable:
    """The function that `package.module:function` names.

    Raises:
        ConfigError: there is no such module, or no such function in it.
    """
    module, _, function = path.partition(":")
    if not module or module.startswith("."):
        raise ConfigError(f"{path!r}: there is no module {module!r}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path!r}: there is no module {error.name!r}") from error
    if not callable(getattr(found, function, None)):
        public = [name for name in vars(found) if not name.startswith("_")]
        raise ConfigError(f"{path!r}: {unknown('function', function, public)}")
    return getattr(found, function)


def _find(name: str, entries: list[Entry], what: str) -> Callable:
    if ":" in name:
        return import_by_path(name)
    found = [entry for entry in entries if entry.name == name]
    if not found:
        raise ConfigError(unknown(what, name, sorted({entry.name for entry in entries})))
    first = [entry for entry in found if entry.module.split(".")[0] == found[0].module.split(".")[0]]
    if len(first) > 1:
        places = ", ".join(f"{entry.file}:{entry.line}" for entry in first)
        raise ConfigError(f"{what} {name!r} is ambiguous: {places}; name one as package.module:function")
    return first[0].load()


def _scan(folder: str, returns: str) -> list[Entry]:
    entries = []
    own = Path.cwd() / folder
    if own.is_dir() and own.resolve() != (_BUILT_IN / folder).resolve():
        entries += _scan_folder(own, folder, returns)
    return entries + _scan_folder(_BUILT_IN / folder, f"fiddlehead.{folder}", returns)


def _scan_folder(folder: Path, package: str, returns: str) -> list[Entry]:
    functions: dict[str, list[tuple[Path, ast.FunctionDef]]] = {}
    for file in sorted(folder.glob("*.py")):
        for function in _public_functions(file):
            functions.setdefault(function.name, []).append((file, function))
    bodies = {name: found[0][1] for name, found in functions.items()}
    return [
        Entry(
            name=name,
            module=f"{package}.{file.stem}",
            file=file.resolve(),
            line=function.lineno,
            summary=(ast.get_docstring(function) or "").split("\n")[0],
            task=_task(name, bodies),
        )
        for name, found in functions.items()
        for file, function in found
        if _returns(function, returns)
        if returns != "Recipe" or not _needs_arguments(function)
    ]


def _returns(function: ast.FunctionDef, kind: str) -> bool:
    """Whether a function says it returns a `kind`, or says nothing and returns what an executor function does."""
    if function.returns is not None:
        return ast.unparse(function.returns).strip("'\"").split("[")[0].endswith(kind)
    ends = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    calls = [ast.unparse(end.func).split(".")[-1] for end in ends if isinstance(end, ast.Call)]
    return kind == "Executor" and bool(calls) and all(call in ("local", "slurm", "docker") for call in calls)


def _public_functions(file: Path) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(file.read_bytes())  # bytes: Python itself knows their encoding
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno or 1}: {error.msg}") from error
    except ValueError as error:  # a null byte
        raise ConfigError(f"{file}: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def _needs_arguments(function: ast.FunctionDef) -> bool:
    arguments = function.args
    positional = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return positional > 0 or any(default is None for default in arguments.kw_defaults)


def _task(name: str, bodies: dict[str, ast.FunctionDef]) -> str:
    """The skeleton that a recipe calls, through other recipes if need be; "" if it cannot be told."""
    seen: list[str] = []
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in ("pretrain", "finetune"):
            return current
        if current in seen or current not in bodies:
            continue
        seen.append(current)
        calls = (node for node in ast.walk(bodies[current]) if isinstance(node, ast.Call))
        waiting += [ast.unparse(call.func).split(".")[-1] for call in calls]
    return ""
