"""The files that a script becomes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fiddlehead.errors import ConfigError
from fiddlehead.migrate.report import Migrated
from fiddlehead.migrate.scope import MadeExecutor, Scope

HEAD = '"""Migrated from a NeMo 2.0 script by `fiddlehead migrate`."""\n\nfrom __future__ import annotations\n\n'


def recipe_text(scopes: Mapping[str, Scope], constants: Iterable[str]) -> str:
    """The file of the recipes: a function for each."""
    used = {"from fiddlehead.recipe import Recipe", *(line for scope in scopes.values() for line in scope.imports)}
    fiddle = used & {"import fiddle as fdl"}
    imports = [*fiddle, *([""] if fiddle else []), *sorted(used - fiddle)]
    functions = [
        f"def {name}({scope.parameters}) -> Recipe:\n{_indented(scope.body)}    return recipe\n"
        for name, scope in scopes.items()
    ]
    return HEAD + "\n".join(imports) + "\n" + "\n\n".join([_middle(constants), *functions])


def launch_text(executors: Iterable[str], constants: Iterable[str]) -> str:
    """The file of the executors; "" if there are none."""
    functions = list(executors)
    return HEAD + "import nemo_run as run\n" + "\n\n".join([_middle(constants), *functions]) if functions else ""


def executor_text(scope: Scope, made: MadeExecutor) -> str:
    """The function of one executor."""
    used = " ".join(made.lines)
    kept = [line for line in scope.kept if re.search(rf"\b{re.escape(line.split(' = ')[0])}\b", used)]
    first, *others = made.lines
    last = [first, *others, "return executor"] if others else [f"return {first.removeprefix('executor = ')}"]
    return f"def {made.function}({scope.parameters}) -> run.{made.kind}:\n{_indented([*kept, *last])}"


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
