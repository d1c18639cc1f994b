"""The statements of a function of a script, or of its top level, and what they make."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from fiddlehead.migrate.report import Migrated
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.nemo_names import NAMES

CONFIGS = ("Config", "Partial")
"""The configurations of Fiddle and NeMo-Run."""
RECIPES = ("pretrain_recipe", "finetune_recipe")
"""The functions of NeMo's models that make a recipe."""
TASKS = {"pretrain": "pretrain", "train": "pretrain", "finetune": "finetune"}
"""NeMo's functions that train, and the task here."""
SAFE = (
    "abs", "bool", "dict", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min", "range", "round",
    "str", "sum", "tuple", "zip",
    "Path", "os.environ", "os.environ.get", "os.getenv", "os.getcwd", "os.path.join", "os.path.expanduser",
    "os.path.abspath", "os.path.basename", "os.path.dirname",
    "ValueError", "RuntimeError", "TypeError",
)  # fmt: skip
"""The functions and names of Python's that a migrated file keeps."""
METHODS = ("append", "extend", "format", "get", "items", "join", "keys", "lower", "replace", "split", "strip", "update",
           "upper", "values")  # fmt: skip
"""The methods of texts, lists and mappings whose calls a migrated file keeps."""


def is_name(text: str) -> bool:
    """Whether a text can be a name in Python."""
    return text.isidentifier() and not keyword.iskeyword(text)


def defaults_of(arguments: ast.arguments) -> dict[str, ast.expr]:
    """The default values of a function's parameters, by name."""
    names = [each.arg for each in arguments.args[len(arguments.args) - len(arguments.defaults) :]]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    only = {each.arg: value for each, value in pairs if value is not None}
    return {**dict(zip(names, arguments.defaults, strict=True)), **only}


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
    """The recipe that the lines make as far as their values are literal, to see which fields it has."""
    unsure: set[str] = field(default_factory=set)
    """The fields whose values are not literal."""
    literals: dict[str, ast.expr] = field(default_factory=dict)
    """The values of names that have a literal one."""
    edited: bool = False
    body: list[str] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    executors: dict[str, MadeExecutor] = field(default_factory=dict)
    """By the script's names of them."""
    aliases: dict[str, list[ast.Call]] = field(default_factory=dict)
    """The calls of an executor's function that make a variable: of each, where a condition chooses one."""
    plugins: dict[str, list[ast.expr]] = field(default_factory=dict)
    """By the script's names of the variables that hold them."""
    kept: list[str] = field(default_factory=list)
    """Statements that an executor may need."""
    parts: dict[str, ast.expr] = field(default_factory=dict)
    """The parts of recipes, by the script's names of them."""
    functions: dict[str, tuple[list[str], dict[str, ast.expr], ast.expr]] = field(default_factory=dict)
    """The script's functions that return a part: their parameters, default values, and the part."""
    numbered: int = 1
    """How many recipes its lines have begun."""
    sizes: dict[str, str] = field(default_factory=dict)
    """The parameters that are the number of nodes or of devices: the fields that they set."""
    relayed: tuple[str, ast.Call] | None = None
    """The function of the script that makes the recipe, and its call."""
    is_helper: bool = False
    """Whether it is a function that changes a recipe that it is given."""

    def is_plain(self, node: ast.AST) -> bool:
        """Whether an expression has only literals, operators, and names and functions that the files have too."""
        if isinstance(node, ast.Name):
            return node.id in self.known or node.id.startswith("recipe.")
        if isinstance(node, ast.Attribute):
            return ast.unparse(node) in SAFE
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
        if is_method and ast.unparse(node.func) not in SAFE:  # type: ignore[attr-defined]
            if node.func.attr == "replace" and len(node.args) != 2:  # type: ignore[attr-defined]
                return False  # a path's moves a file; a text's has two arguments
            inner: list[ast.AST] = [node.func.value, *node.args, *node.keywords]  # type: ignore[attr-defined]
            return all(map(self.is_plain, inner))
        if isinstance(node, ast.comprehension):
            inner = [node.iter, *node.ifs]
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            return self._is_plain_comprehension(node)
        elif isinstance(node, (ast.Lambda, ast.Await, ast.NamedExpr, ast.Yield, ast.YieldFrom)):
            return False
        else:
            inner = list(ast.iter_child_nodes(node))
        return all(map(self.is_plain, inner))

    def _is_plain_comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> bool:
        bound = {name.id for each in node.generators for name in ast.walk(each.target) if isinstance(name, ast.Name)}
        before = self.known
        self.known = before | bound
        try:
            parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return all(map(self.is_plain, [*node.generators, *parts]))
        finally:
            self.known = before

    def put(self, path: str, text: str) -> None:
        """Adds the line that sets a field of the recipe."""
        line = f"recipe.{path} = {text}"
        if match := re.fullmatch(r"optim\.betas\[([01])\]", path):
            pair = (text, "recipe.optim.betas[1]") if match[1] == "0" else ("recipe.optim.betas[0]", text)
            line = f"recipe.optim.betas = ({', '.join(pair)})"
        if self.body[-1:] != [line]:
            self.body.append(line)
        self.edited = True
        self.note(path, text)

    def keep(self, text: str) -> None:
        """Keeps a statement of the script's own."""
        self.kept.append(text)
        if self.variable:
            self.body.append(text)

    def lines(self) -> list[list[str]]:
        """The lists of lines that statements add to."""
        return [self.body, self.kept, *(made.lines for made in self.executors.values())]

    def arguments(self, call: ast.Call, names: Sequence[str]) -> list[str]:
        """The arguments of a call that the files know, by name; of others the report says that they are to be set.

        Args:
            names: of the parameters of the function.
        """
        named = [(each.arg, each.value) for each in call.keywords if each.arg]
        for each in call.keywords:
            if each.arg is None:
                self.out.say(each, f"not migrated: name the arguments of **{ast.unparse(each.value)}")
        pairs = [*zip(names, call.args, strict=False), *named]
        taken = []
        for name, node in pairs:
            read = self.reads(node)
            try:
                value = self.literal(read)
                text = f'"{value}"' if isinstance(value, str) and not set(value) & set('"\\\n') else repr(value)
            except ValueError:
                text = ast.unparse(read)
            if not self.is_plain(read):
                self.out.say(node, "set it yourself; the recipe does not know its value")
            else:
                taken.append(f"{name}={text}")
        return taken

    def literal(self, node: ast.expr) -> Any:
        """The value of an expression.

        Raises:
            ValueError: it is not a literal.
        """
        try:
            return ast.literal_eval(_Folded().visit(Replace(self.literals).visit(deepcopy(node))))
        except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(str(error)) from error

    def reads(self, node: ast.expr) -> ast.expr:
        """An expression with our names for the fields of the recipe that it reads."""
        return _Reads(self.variable).visit(deepcopy(node)) if self.variable else node

    def known_value(self, path: str) -> ast.expr | None:
        """The value of a field of the recipe, where the lines up to here say it."""
        found: Any = None if path in self.unsure else self.sample
        for part in path.split("."):
            found = getattr(found, part, None)
        return ast.Constant(found) if isinstance(found, (int, float, str)) else None

    def note(self, path: str, text: str) -> None:
        """Sets a field of the sample, if its value is literal."""
        *owners, last = path.split(".")
        found: Any = self.sample
        for part in owners:
            found = getattr(found, part, None)
        try:
            setattr(found, last, self.literal(ast.parse(text, mode="eval").body))
            self.unsure.discard(path)
        except (ValueError, SyntaxError, AttributeError, TypeError):
            self.unsure.add(path)


class Replace(ast.NodeTransformer):
    """Puts expressions in the place of names."""

    def __init__(self, names: Mapping[str, ast.expr]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.names:
            return ast.copy_location(deepcopy(self.names[node.id]), node)
        return node


class _Folded(ast.NodeTransformer):
    """Texts with literal values in them, as literal texts."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        self.generic_visit(node)
        parts = [each.value if isinstance(each, ast.FormattedValue) else each for each in node.values]
        plain = all(getattr(each, "format_spec", None) is None for each in node.values)
        if not plain or not all(isinstance(each, ast.Constant) for each in parts):
            return node
        return ast.copy_location(ast.Constant("".join(str(each.value) for each in parts)), node)  # type: ignore[attr-defined]


class _Reads(ast.NodeTransformer):
    def __init__(self, variable: str) -> None:
        self.variable = variable

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        root, _, path = ast.unparse(node).partition(".")
        named = {each.nemo: each for each in NAMES}.get(path)
        ours = path if named is None else named.ours if named.same else ""
        if root != self.variable or not ours or "[" in ours or "(" in ours:
            self.generic_visit(node)
            return node
        return ast.copy_location(ast.Name(f"recipe.{ours}", node.ctx), node)


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
