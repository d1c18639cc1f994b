"""Finds the user's own modules that some modules import, also inside functions. Nothing is imported here."""

from __future__ import annotations

import ast
import contextlib
import site
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from fiddlehead.recipe import project


@dataclass(frozen=True)
class Module:
    """A user's own module: not in the standard library, and not in a folder of installed packages."""

    name: str
    file: Path
    importer: str
    """The module that imports it; "" for one that was asked for."""
    data: list[Path] = field(default_factory=list)
    """Files in or below its folder that it names."""


def modules_of(names: Iterable[str]) -> list[Module]:
    """The user's own modules among `names`, the modules that these import in turn, and their packages.

    Imports for type checkers, and of a module that runs as a script, do not count. A module that imports a computed
    name may need all loaded modules of its package.
    """
    found: dict[str, Module] = {}
    waiting = [(name, "") for name in names]
    asked = {name for name, _ in waiting}
    seen: set[str] = set()
    while waiting:
        name, importer = waiting.pop(0)
        for module in _with_packages(name):
            if module in seen:
                continue
            seen.add(module)
            file, folders = _located(module)
            if file is None or _is_installed(file):
                if file is not None or folders is None:
                    break  # so all that is below it is too; and a namespace package goes on
                continue
            found[module] = Module(module, file, importer)
            # This package's own modules are many, and come together.
            if file.suffix == ".py" and (module in asked or module.partition(".")[0] != "fiddlehead"):
                reader = _Reader(module, file, is_package=folders is not None)
                waiting += [(each, module) for each in reader.imports]
                found[module].data.extend(reader.data)
    return list(found.values())


def _with_packages(name: str) -> Iterator[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def _located(name: str) -> tuple[Path | None, list[str] | None]:
    """The file of a module, if it has one, and the folders that its submodules are in, if it is a package."""
    module, parent = sys.modules.get(name), name.rpartition(".")[0]
    if module is not None:
        file, folders = getattr(module, "__file__", None), getattr(module, "__path__", None)
        return (Path(file).absolute() if file else None), (None if folders is None else [*folders])
    spec = None
    with contextlib.suppress(ImportError, ValueError, AttributeError):  # of a finder, or a name that no module can have
        if parent:
            # By its last part: of a namespace package Python would look for the parent among what is imported.
            spec = PathFinder.find_spec(name.rpartition(".")[2], _located(parent)[1] or [])
        else:
            spec = find_spec(name) or PathFinder.find_spec(name, [project.folder()])
    if spec is None:
        return None, None
    file = Path(spec.origin).absolute() if spec.has_location and spec.origin else None
    folders = spec.submodule_search_locations
    return file, (None if folders is None else [*folders])


@cache
def _installed_folders() -> frozenset[str]:
    """The folders of this interpreter's standard library and packages."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return frozenset([*folders, *site.getsitepackages(), site.getusersitepackages()])


def _is_installed(file: Path) -> bool:
    parts = {"site-packages", "dist-packages"}.intersection(file.parts)
    return bool(parts) or any(str(folder) in _installed_folders() for folder in file.parents)


class _Reader(ast.NodeVisitor):
    """Collects what a Python file imports and which files it names; nothing if it is not valid Python."""

    def __init__(self, module: str, file: Path, *, is_package: bool) -> None:
        self.imports: list[str] = []
        self.data: list[Path] = []
        self._package = module if is_package else module.rpartition(".")[0]
        self._texts: list[str] = []
        with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            content = file.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Python says of the user's code it says when that is imported
                self.visit(ast.parse(content))
            if any(word in content for word in (b"__file__", b"resources", b"get_data", b"__path__")):
                named = dict.fromkeys(file.parent / text for text in self._texts if _is_file(file.parent, text))
                self.data = [path for path in named if path.suffix not in (".py", ".pyc")]

    def visit_Import(self, node: ast.Import) -> None:
        self.imports += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if base := self._absolute(node.level, node.module or ""):
            # Each name may be a module, or something in one.
            self.imports += [base, *(f"{base}.{alias.name}" for alias in node.names if alias.name != "*")]

    def _absolute(self, dots: int, name: str) -> str:
        """The full name of a module that a relative import names with this number of dots."""
        package = self._package.split(".")
        above = package[: len(package) - dots + 1] if dots else []
        return ".".join(filter(None, [*above, name]))

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        if test in ("TYPE_CHECKING", "typing.TYPE_CHECKING") or test.startswith("__name__ =="):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        if name in ("import_module", "__import__") and node.args:
            if texts:
                name = texts[0].lstrip(".")
                self.imports.append(self._absolute(len(texts[0]) - len(name), name))
            else:
                top = self._package.partition(".")[0]
                self.imports += [each for each in list(sys.modules) if top and each.startswith(f"{top}.")]
        self._texts.append("/".join(texts))  # of joinpath(...) or os.path.join(...)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts: list[str] = []
        each: ast.expr = node
        while isinstance(each, ast.BinOp) and isinstance(each.right, ast.Constant) and isinstance(each.op, ast.Div):
            texts.insert(0, str(each.right.value))
            each = each.left
        self._texts.append("/".join(texts))  # of Path(...) / "a" / "b"
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._texts.append(node.value)


def _is_file(folder: Path, text: str) -> bool:
    """Whether a string in a program names a file in or below a folder."""
    if not text or len(text) > 200 or "\0" in text or text.startswith("/"):
        return False
    with contextlib.suppress(OSError):
        return (folder / text).is_file()
    return False
