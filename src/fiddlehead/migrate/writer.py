"""The files that a script becomes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

from fiddlehead.errors import ConfigError
from fiddlehead.migrate.report import Migrated
from fiddlehead.migrate.scope import MadeExecutor, Scope

HEAD = '"""Migrated from a NeMo 2.0 script by `fiddlehead migrate`."""\n\nfrom __future__ import annotations\n\n'


def recipe_text(scopes: Mapping[str, Scope], constants: Iterable[str]) -> str:
    """The file of the recipes: a function for each."""
    used = _merged({"from fiddlehead.recipe import Recipe", *(e for scope in scopes.values() for e in scope.imports)})
    fiddle = used & {"import fiddle as fdl"}
    functions = [
        f"def {name}({parameters(scope, scope.body)}) -> {'None' if scope.is_helper else 'Recipe'}:\n"
        + _indented(scope.body if scope.is_helper else [*scope.body, "return recipe"])
        for name, scope in scopes.items()
    ]
    text = "\n\n".join([_middle(constants), *functions])
    imports = [*_standard(text), *fiddle]
    return HEAD + "\n".join([*imports, *([""] if imports else []), *sorted(used - fiddle)]) + "\n" + text


def launch_text(executors: Iterable[str], constants: Iterable[str]) -> str:
    """The file of the executors; "" if there are none."""
    functions, kept = list(executors), []
    used = "\n".join(functions)
    for line in reversed(list(constants)):
        if any(re.search(rf"\b{re.escape(name)}\b", used) for name in _changed(line)):
            kept.insert(0, line)
            used += f"\n{line}"
    text = "\n\n".join([_middle(kept), *functions])
    imports = _standard(text)
    return (
        HEAD + "\n".join([*imports, *([""] if imports else []), "import nemo_run as run\n"]) + text if functions else ""
    )


def executor_text(scope: Scope, made: MadeExecutor) -> str:
    """The function of one executor."""
    used, kept = "\n".join(made.lines), []
    for line in reversed(scope.kept):
        if any(re.search(rf"\b{re.escape(name)}\b", used) for name in _changed(line)):
            kept.insert(0, line)
            used += f"\n{line}"
    first, *others = made.lines
    last = [first, *others, "return executor"] if others else [f"return {first.removeprefix('executor = ')}"]
    lines = [*kept, *last]
    return f"def {made.function}({parameters(scope, lines)}) -> run.{made.kind}:\n{_indented(lines)}"


def used_parameters(text: str) -> list[str]:
    """The names of the parameters of a function."""
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    return [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]


def _changed(line: str) -> set[str]:
    """The variables that a statement sets or changes."""
    found = set[str]()
    for node in ast.walk(ast.parse(line)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.value, ast.Name):
            found.add(node.value.id)
    return found


def parameters(scope: Scope, lines: Iterable[str]) -> str:
    """The parameters of a function: of the options of the command line, those that its lines use.

    An option that is None by default is None only where the lines ask for that.
    """
    text = "\n".join(lines)
    arguments = deepcopy(ast.parse(f"def f({scope.parameters}): ...").body[0].args)  # type: ignore[attr-defined]
    pairs = list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    used = [(each, value) for each, value in pairs if re.search(rf"\b{each.arg}\b", text)]
    arguments.kwonlyargs = [each for each, _ in used]
    arguments.kw_defaults = [None if _is_needed(each.arg, value, text) else value for each, value in used]
    return ast.unparse(arguments)


def _is_needed(name: str, value: ast.expr | None, text: str) -> bool:
    is_none = isinstance(value, ast.Constant) and value.value is None
    is_set = re.search(rf"(?m)^\s*recipe\.\S+ = {name}$", text)
    return is_none and bool(is_set) and not re.search(rf"\bif\b.*\b{name}\b", text)


def _merged(imports: Iterable[str]) -> set[str]:
    """Imports from one module as one line."""
    modules = dict[str, list[str]]()
    for line in sorted(imports):
        module, _, name = line.partition(" import ")
        modules.setdefault(module, []).append(name)
    return {f"{module} import {', '.join(names)}" if names != [""] else module for module, names in modules.items()}


def _standard(text: str) -> list[str]:
    """The imports of Python's own modules that a text needs."""
    named = {"os": "import os", "Path": "from pathlib import Path"}
    return [line for name, line in named.items() if re.search(rf"\b{name}[.(]", text)]


def _middle(constants: Iterable[str]) -> str:
    text = "".join(f"{line}\n" for line in constants)
    return f"\n{text}" if text else ""


def _indented(lines: Iterable[str]) -> str:
    return "".join(f"    {line}\n" for each in lines for line in each.split("\n"))


def write(migrated: Migrated, folder: Path, name: str, *, overwrite: bool = False) -> list[Path]:
    """Writes `recipes/NAME.py` and `launch/NAME.py` into the folder.

    Raises:
        ConfigError: one exists, and `overwrite` is not given; nothing was written.
    """
    files = {folder / "recipes" / f"{name}.py": migrated.recipe, folder / "launch" / f"{name}.py": migrated.launch}
    files = {file: text for file, text in files.items() if text}
    if not overwrite and (there := [file for file in files if file.exists()]):
        raise ConfigError(*(f"{file} exists; --overwrite replaces it" for file in there))
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return list(files)
