"""Recipes and executors by name: found by reading files, imported only when called.

The functions of `recipes/*.py` (or `launch/*.py`) in the working directory come first, then the built-in ones.
`package.module:function` names anything importable. A broken file is an error only if one of its names is used.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe import project
from fiddlehead.recipe.allowed import PARTS

MODEL_RECIPES = ("pretrain_recipe", "finetune_recipe")
"""The recipes that a model's recipe has as attributes."""

_BUILT_IN = Path(__file__).parents[1]


@dataclass(frozen=True)
class Entry:
    """A function that can be named on the command line."""

    name: str
    module: str
    file: Path
    line: int
    summary: str
    task: str
    """For a recipe: the base function that it calls, directly or through another recipe."""
    tunes: bool = False
    """Whether it is a model's recipe, whose `finetune_recipe` fine-tunes that model."""

    def load(self) -> Callable:
        """Imports the module and returns the function.

        Raises:
            ConfigError: Python finds another package of that name first.
        """
        if not self.module.startswith("fiddlehead."):
            project.make_importable()
        try:
            return getattr(importlib.import_module(self.module), self.name)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise
            other = getattr(sys.modules[self.module.split(".")[0]], "__file__", "elsewhere")
            hint = f"Python finds {other} first, so remove that from the environment or from PYTHONPATH"
            raise ConfigError(f"{self.file} cannot be imported as {self.module}: {hint}") from error


@dataclass(frozen=True)
class Broken:
    """A file that cannot be read, or is not valid Python; `line` is 0 if that has none."""

    file: Path
    line: int
    problem: str

    def __str__(self) -> str:
        return Problem.in_file(f"{self.file}{f':{self.line}' if self.line else ''}", self.problem)


@dataclass
class _Shelf:
    """The functions in the files of one folder that return a `returns`; errors call them a `what`."""

    what: str
    folder: str
    returns: str
    entries: list[Entry] = field(default_factory=list)
    asking: list[Entry] = field(default_factory=list)
    """Those that have arguments without a default, so only a call names them."""
    others: dict[str, str] = field(default_factory=dict)
    """The functions that cannot be named: their places, and why."""
    unsaid: set[str] = field(default_factory=set)
    """Those of them that may be meant as recipes: they say nothing of what they return, and need no arguments."""
    broken: list[Broken] = field(default_factory=list)

    def read(self) -> _Shelf:
        """Reads the user's folder, if there is one, and ours."""
        own, ours = Path.cwd() / self.folder, _BUILT_IN / self.folder
        if own.is_dir() and own.resolve() != ours.resolve():
            self._read(own, self.folder)
        built_in = _built_in(self.what, self.folder, self.returns)
        # One of ours is not taken in the place of the user's without a word.
        self.entries += [entry for entry in built_in.entries if entry.name not in self.unsaid]
        self.asking += built_in.asking
        self.others = built_in.others | self.others
        self.broken += built_in.broken
        return self

    def _read(self, folder: Path, package: str) -> None:
        functions: list[tuple[Path, ast.FunctionDef]] = []
        for file in sorted(folder.glob("*.py")):
            if file.name.startswith("."):  # an editor's
                continue
            parsed = _parse(file)
            if isinstance(parsed, Broken):
                self.broken.append(parsed)
                continue
            defined = [node for node in parsed.body if isinstance(node, ast.FunctionDef)]
            functions += [(file, node) for node in defined if not node.name.startswith("_")]
        bodies = {node.name: node for _, node in reversed(functions)}
        for file, node in functions:
            name = node.name
            if not _returns(node, self.returns):
                if self.returns == "Recipe" or not _returns(node, "Recipe"):
                    said = f"says that it returns {ast.unparse(node.returns)}" if node.returns else ""
                    why = f"{said or 'does not say what it returns'}; write `def {name}(...) -> {self.returns}:`"
                    self.others.setdefault(name, Problem.in_file(f"{file}:{node.lineno}", f"{name} {why}"))
                    if self.returns == "Recipe" and node.returns is None and not _asks(node):
                        self.unsaid.add(name)
                continue
            summary = (ast.get_docstring(node) or "").split("\n")[0]
            module, task = f"{package}.{file.stem}", _task(name, bodies)
            tunes = any(ast.unparse(each).split(".")[-1] == "model_recipe" for each in node.decorator_list)
            entry = Entry(name, module, file.resolve(), node.lineno, summary, task, tunes)
            asks = self.returns == "Recipe" and _asks(node)
            (self.asking if asks else self.entries).append(entry)

    def find(self, name: str, *, called: bool = False) -> Callable:
        """The function called `name`; a user's comes before ours. `called`: it is given arguments."""
        for broken in self.broken:
            if _defines(broken.file, name):
                raise ConfigError(f"{self.what} {name!r}: {broken}")
        known = [*self.entries, *self.asking] if called else self.entries
        entries = [entry for entry in known if entry.name == name]
        if not entries:
            raise self.missing(name)
        first = [entry for entry in entries if entry.module.split(".")[0] == entries[0].module.split(".")[0]]
        if len(first) > 1:
            places = ", ".join(f"{entry.file}:{entry.line}" for entry in first)
            raise ConfigError(f"{self.what} {name!r} is ambiguous: {places}; name one as package.module:function")
        return first[0].load()

    def missing(self, name: str, *more: str) -> ConfigError:
        """The error for a name that no entry has, nor any of `more`."""
        for entry in self.asking:
            if entry.name == name:
                said = "has arguments without a default, so it is not a recipe by itself"
                why = f"{name} {said}; give them, '{name}(ARGUMENT=VALUE)'"
                return ConfigError(f"{self.what} {name!r}: {Problem.in_file(f'{entry.file}:{entry.line}', why)}")
        if name in self.others:
            return ConfigError(f"{self.what} {name!r}: {self.others[name]}")
        unread = [f"{broken} (so whatever is in this file is not found)" for broken in self.broken]
        return ConfigError(
            Problem.unknown("", name, self.what, sorted({*more, *(entry.name for entry in self.entries)})), *unread
        )


@functools.cache
def _built_in(what: str, folder: str, returns: str) -> _Shelf:
    """What comes with the package, which does not change while a process runs; each command asks several times."""
    shelf = _Shelf(what, folder, returns)
    shelf._read(_BUILT_IN / folder, f"fiddlehead.{folder}")
    return shelf


def _recipes() -> _Shelf:
    return _Shelf("recipe", "recipes", "Recipe").read()


def _executors() -> _Shelf:
    return _Shelf("executor", "launch", "Executor").read()


def recipes() -> list[Entry]:
    """All recipes: public functions that are annotated to return a `Recipe` and have no required arguments."""
    return _recipes().entries


def broken_recipes() -> list[Broken]:
    """The files of `recipes/` that cannot be read, and the reasons."""
    return _recipes().broken


def executors() -> list[Entry]:
    """All executors: public functions that are annotated to return a kind of `Executor`, or call such a function."""
    return _executors().entries


def find_recipe(name: str, *, called: bool = False) -> Callable:
    """The recipe function called `name`; of a model's recipe, also as `NAME.pretrain_recipe` or `NAME.finetune_recipe`.

    Args:
        called: it is given arguments, so it may also be one that needs some.

    Raises:
        ConfigError: there is none, or the working directory has two, or a file that may have it cannot be read.
    """
    of, _, variant = name.rpartition(".")
    if of and variant in MODEL_RECIPES:
        function = find_recipe(of)
        if not hasattr(function, variant):
            raise ConfigError(f"recipe {name!r}: {of} is not a model's recipe, which @model_recipe makes of a function")
        return getattr(function, variant)
    return import_by_path(name) if ":" in name else _recipes().find(name, called=called)


def find_executor(name: str) -> Callable:
    """The executor function called `name`; errors as those of `find_recipe`."""
    return import_by_path(name) if ":" in name else _executors().find(name)


def find_part(name: str) -> Callable:
    """Finds a part of a recipe by name: a class, or a function that returns its Config.

    The functions are those of `recipes/*.py` that are annotated to return a `Config`, by their name or as
    ``recipes.file:name``; the classes are those that `fiddlehead.recipe.allowed` lists.

    Raises:
        ConfigError: there is no such part, or the working directory has two.
    """
    parts = _Shelf("part of a recipe", "recipes", "Config").read()
    for entry in parts.entries:
        if name == f"{entry.module}:{entry.name}":
            return entry.load()
        if name == entry.name:
            return parts.find(name)
    ours = {part: package for package, names in PARTS.items() if package.startswith("fiddlehead.") for part in names}
    if name not in ours:
        raise parts.missing(name, *ours)
    return getattr(importlib.import_module(ours[name]), name)


def import_by_path(path: str) -> Callable:
    """The function that `package.module:function` names.

    Raises:
        ConfigError: there is no such module, or no such function in it.
    """
    module, _, function = path.partition(":")
    if not module or module.startswith("."):
        raise ConfigError(f"{path!r}: there is no module {module!r}")
    project.make_importable()
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path!r}: there is no module {error.name!r}") from error
    if not callable(getattr(found, function, None)):
        public = [name for name in vars(found) if not name.startswith("_")]
        raise ConfigError(f"{path!r}: {Problem.unknown('', function, 'function', public)}")
    return getattr(found, function)


def _asks(function: ast.FunctionDef) -> bool:
    """Whether a function has arguments without a default."""
    arguments = function.args
    positional = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return positional > 0 or None in arguments.kw_defaults


def _returns(function: ast.FunctionDef, kind: str) -> bool:
    """Whether a function's annotation returns a `kind`, or it has none and returns an executor function's call."""
    if function.returns is not None:
        said = ast.unparse(function.returns).strip("'\"")
        if kind == "Executor" and (inner := re.fullmatch(r"(?:\w+\.)*Config\[(.*)\]", said)):  # as NeMo-Run's factories
            said = inner[1]
        return said.split("[")[0].endswith(kind)
    if kind != "Executor":
        return False
    inner = list(ast.walk(function))
    made = {
        target.id: node.value
        for node in inner
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    ends = [node.value for node in inner if isinstance(node, ast.Return)]
    ends = [made.get(end.id) if isinstance(end, ast.Name) else end for end in ends]
    calls = [ast.unparse(end.func).split(".")[-1] if isinstance(end, ast.Call) else "" for end in ends]
    return bool(calls) and all(call in ("local", "slurm", "docker") or call.endswith(kind) for call in calls)


def _parse(file: Path) -> ast.Module | Broken:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of the user's code when that is imported
            return ast.parse(file.read_bytes())  # bytes: Python itself knows their encoding
    except SyntaxError as error:
        return Broken(file, error.lineno or 1, error.msg)
    except OSError as error:
        return Broken(file, 0, f"it is a link to {file.readlink()}" if file.is_symlink() else str(error.strerror))
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; brackets without end
        return Broken(file, 0, str(error) or "it is nested too deeply")


def _defines(file: Path, name: str) -> bool:
    """Whether a file that is not valid Python seems to define the function `name`."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(rf"^(async )?def {re.escape(name)}\b", text, re.MULTILINE) is not None


def _task(name: str, bodies: dict[str, ast.FunctionDef]) -> str:
    """The base function that a recipe calls, directly or through other recipes; "" if none is found."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in ("pretrain", "finetune"):
            return current
        if current in bodies and current not in seen:
            seen.add(current)
            calls = (node for node in ast.walk(bodies[current]) if isinstance(node, ast.Call))
            waiting += [ast.unparse(call.func).split(".")[-1] for call in calls]
    return ""
