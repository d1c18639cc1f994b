"""The statements of a function of a script, or of its top level, and what they make."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from fiddlehead.migrate.report import Migrated
from fiddlehead.recipe import Recipe

CONFIGS = ("Config", "Partial")
"""The configurations of Fiddle and NeMo-Run."""
SAFE = ("abs", "bool", "dict", "float", "int", "len", "list", "max", "min", "range", "round", "str", "sum", "tuple")
"""The functions whose calls a migrated file keeps."""


@dataclass
class MadeExecutor:
    """A function of the launch file."""

    function: str
    kind: str
    """NeMo-Run's class."""
    lines: list[str]
    """They make and change the variable `executor`; the first is the call that makes it."""


@dataclass
class Scope:
    """The statements of a function, or of the top level, as a recipe or an executor."""

    name: str
    out: Migrated
    parameters: str = ""
    known: set[str] = field(default_factory=set)
    """The names that the files have too."""
    variable: str = ""
    """The script's name of the recipe."""
    sample: Recipe | None = None
    """The recipe that the first line makes, to see which fields it has."""
    edited: bool = False
    body: list[str] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    executors: dict[str, MadeExecutor] = field(default_factory=dict)
    """By the script's names of them."""
    aliases: dict[str, ast.Call] = field(default_factory=dict)
    """The variables that a call of an executor's function makes."""
    plugins: dict[str, list[ast.expr]] = field(default_factory=dict)
    """By the script's names of the variables that hold them."""
    kept: list[str] = field(default_factory=list)
    """Assignments that an executor may need."""

    def is_plain(self, node: ast.expr) -> bool:
        """Whether an expression has only literals, operators, and names and functions that the files have too."""
        return all(
            each.id in self.known
            if isinstance(each, ast.Name)
            else not isinstance(each, (ast.Attribute, ast.Lambda, ast.Await))
            for each in ast.walk(node)
        )

    def put(self, path: str, text: str) -> None:
        """Adds the line that sets a field of the recipe."""
        line = f"recipe.{path} = {text}"
        if match := re.fullmatch(r"optim\.betas\[([01])\]", path):
            pair = (text, "recipe.optim.betas[1]") if match[1] == "0" else ("recipe.optim.betas[0]", text)
            line = f"recipe.optim.betas = ({', '.join(pair)})"
        self.body.append(line)
        self.edited = True


def last_name(node: ast.expr) -> str:
    """The last word of a dotted name: ``LoRA`` of ``llm.peft.LoRA``."""
    return ast.unparse(node).split(".")[-1]


def made_by(call: ast.Call) -> tuple[str, ast.Call]:
    """The class that a call makes, or that a configuration is of: ``LoRA`` for ``run.Config(llm.peft.LoRA, ...)``.

    Also the call without the configuration's first argument.
    """
    name = last_name(call.func)
    if name in CONFIGS and call.args:
        return last_name(call.args[0]), ast.Call(call.args[0], call.args[1:], call.keywords)
    return name, call
