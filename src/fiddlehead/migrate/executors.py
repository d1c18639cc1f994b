"""Executors of a script: functions of the launch file that return NeMo-Run's own, which are accepted as they are."""

from __future__ import annotations

import ast

from fiddlehead.errors import Problem
from fiddlehead.launch.nemo.fields import ADVICE, PARTS
from fiddlehead.migrate.scope import MadeExecutor, Scope, last_name, made_by

FIELDS = {name.rpartition(".")[2]: parts for name, parts in PARTS.items()}
"""What becomes of each field of a class of NeMo-Run's that is taken over."""
HANDED = (
    "SkypilotExecutor", "SkypilotJobsExecutor", "LeptonExecutor", "DGXCloudExecutor", "KubeflowExecutor"
)  # fmt: skip
"""The executors that are handed to NeMo-Run as they are."""
EXECUTORS = (*(name for name in FIELDS if name.endswith("Executor")), *HANDED)
CHANGES = ("update", "append", "extend")
"""The calls that change a field of an executor."""


def note_executor(scope: Scope, call: ast.Call, variable: str, function: str) -> bool:
    """Notes the executor that a call makes, as a function of the launch file; False if it makes none."""
    kind, bare = made_by(call)
    if kind not in EXECUTORS:
        return False
    first = f"executor = {_text(_kept(scope, bare))}"
    if variable in scope.executors and scope.executors[variable].lines[0] == first:  # the next round of a loop
        return True
    if variable in scope.executors:  # another one, under another condition
        scope.executors[f"{variable}#{len(scope.executors)}"] = scope.executors.pop(variable)
        function = f"{function}_{kind.removesuffix('Executor').lower()}"
    scope.executors[variable] = MadeExecutor(function, kind, [first])
    return True


def change(scope: Scope, node: ast.stmt | ast.expr, variable: str, target: ast.expr, values: list[ast.expr]) -> str:
    """Adds a line that changes an executor, and returns what became of it.

    Args:
        node: the statement, or the call of a method.
        target: what it sets, or the method.
    """
    made = scope.executors[variable]
    place = ast.unparse(target)[len(variable) :]
    name = place.lstrip(".").split(".")[0].split("[")[0]
    names = {each.id for each in ast.walk(target) if isinstance(each, ast.Name)} - {variable}
    kept = [_value(scope, each) for each in values]
    if said := _refused(made.kind, name, values[0] if values else None):
        return f"{name}: {said}"
    if None in kept or not names <= scope.known:
        return f"not migrated: the launch file does not know {ast.unparse(node)}; set executor.{name} there"
    text = ", ".join(ast.unparse(each) for each in kept if each is not None)
    line = f"executor{place}({text})" if isinstance(node, ast.Call) else f"executor{place} = {text}"
    if line not in made.lines:
        made.lines.append(line)
    return "the same line, in the launch file"


def _kept(scope: Scope, call: ast.Call) -> ast.Call:
    """A call of a class of NeMo-Run's, with the arguments that the launch file can have too; others are said."""
    kind, taken = last_name(call.func), []
    for keyword in call.keywords:
        value = _value(scope, keyword.value)
        if said := _refused(kind, keyword.arg or "", keyword.value):
            scope.out.say(keyword, said)
        elif keyword.arg == "subpath":
            scope.out.say(keyword, "left out: the job starts where you launch it, with all files of the repository")
        elif value is None:
            text = ast.unparse(keyword.value)
            scope.out.say(keyword, f"not migrated: the launch file does not know {text}; set {keyword.arg} there")
        else:
            taken.append(ast.keyword(keyword.arg, value))
    args = [value for each in call.args if (value := _value(scope, each)) is not None]
    if len(args) < len(call.args):
        scope.out.say(call, "its arguments without names: the launch file does not know all; set them there")
        args = []
    return ast.Call(ast.Attribute(ast.Name("run"), kind), args, taken)


def _value(scope: Scope, node: ast.expr) -> ast.expr | None:
    """A value as the launch file can have it; None if it needs what only the script has."""
    node = scope.reads(node)
    if isinstance(node, ast.Name) and node.id.startswith("recipe."):
        return scope.known_value(node.id.removeprefix("recipe."))
    if isinstance(node, ast.Call) and made_by(node)[0] in FIELDS:
        return _kept(scope, made_by(node)[1])
    if isinstance(node, ast.Dict) and all(key is None or scope.is_plain(key) for key in node.keys):
        values = [_value(scope, each) for each in node.values]
        return None if None in values else ast.Dict(node.keys, [each for each in values if each is not None])
    return node if scope.is_plain(node) else None


def _refused(kind: str, name: str, value: ast.expr | None) -> str:
    """Why fiddlehead refuses a field of NeMo-Run's, and what to use; "" if it takes it."""
    fields = FIELDS.get(kind)
    literal = value.value if isinstance(value, ast.Constant) else None
    if fields is None or not name:
        return ""
    if name not in fields:
        return Problem.unknown("", name, f"field of {kind}", fields)
    if name == "launcher":
        made = made_by(value)[0] if isinstance(value, ast.Call) else literal
        return ADVICE.get(str(made), "")
    is_off = isinstance(value, ast.Constant) and not literal
    return fields[name].says if fields[name].refused and not is_off else ""


def _text(call: ast.Call) -> str:
    """A call as text, with one argument on each line if it is long."""
    text = ast.unparse(call)
    if len(text) <= 90:
        return text
    arguments = [*map(ast.unparse, call.args), *map(ast.unparse, call.keywords)]
    return f"{ast.unparse(call.func)}(\n{''.join(f'    {each},{chr(10)}' for each in arguments)})"
