"""Parts of NeMo's recipes that a script makes in variables and functions of their own, and the model that they name."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from fiddlehead.migrate.scope import CONFIGS, RECIPES, TASKS, Scope, defaults_of, last_name, made_by
from fiddlehead.migrate.simplify import replaced

PRESETS = re.compile(r"default_log|default_resume|\w+_logger|distributed_fused_adam\w*|(bf16|fp16|nemotron)_\w+")
"""NeMo's functions that make a part."""
NOT_PARTS = re.compile(r"\w*(Executor|Plugin|Packager|Tunnel|Experiment)|Path|ArgumentParser|Torchrun")
DEPTH = 16
"""How many variables and functions stand between a field and its value, at the most."""
Arguments = tuple[list[str], dict[str, ast.expr], ast.expr]
"""The names of a function's parameters, their default values, and what it returns."""


def is_part(call: ast.expr) -> bool:
    """Whether an expression makes a part of a recipe: a trainer, an optimizer, data, a log."""
    if not isinstance(call, ast.Call):
        return False
    kind, _ = made_by(call)
    if NOT_PARTS.fullmatch(kind) or kind in (*RECIPES, *TASKS, "import_ckpt", "export_ckpt"):
        return False
    is_model = isinstance(call.func, ast.Attribute) and call.func.attr == "model"
    is_config = last_name(call.func) in CONFIGS and bool(call.args)
    return is_config or is_model or kind[:1].isupper() or bool(PRESETS.fullmatch(kind))


def note_part(scope: Scope, target: ast.expr, value: ast.expr) -> bool:
    """Notes the part that a variable holds, or a field that is set in one; False if it is something else."""
    if isinstance(target, ast.Name):
        value = resolved(scope, value)
        if is_part(value) or (isinstance(value, (ast.List, ast.Tuple)) and any(map(is_part, value.elts))):
            scope.parts[target.id] = value
            return True
        scope.parts.pop(target.id, None)
        return False
    if isinstance(target, ast.Attribute) and isinstance(found := _held(scope, target.value), ast.Call):
        found.keywords = [each for each in found.keywords if each.arg != target.attr]
        found.keywords.append(ast.copy_location(ast.keyword(target.attr, resolved(scope, value)), target))
        return True
    return False


def note_added(scope: Scope, call: ast.Call) -> bool:
    """Notes what ``append`` adds to a list of parts; False if it is not such a call."""
    held = scope.parts.get(getattr(getattr(call.func, "value", None), "id", ""))
    if last_name(call.func) != "append" or not isinstance(held, ast.List) or len(call.args) != 1:
        return False
    held.elts.append(resolved(scope, call.args[0]))
    return True


def _held(scope: Scope, node: ast.expr) -> ast.expr | None:
    """The part that ``variable`` or ``variable.field`` is."""
    if isinstance(node, ast.Name):
        return scope.parts.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(owner := _held(scope, node.value), ast.Call):
        return next((each.value for each in owner.keywords if each.arg == node.attr), None)
    return None


def part_function(scope: Scope, node: ast.FunctionDef) -> Arguments | None:
    """What a function returns, if that is a part and the function does nothing else."""
    names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
    parts = Scope(node.name, scope.out, functions=scope.functions, parts=dict(scope.parts))
    for statement in node.body:
        if isinstance(statement, ast.Return):
            value = resolved(parts, statement.value or ast.Constant(None))
            lists = value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
            calls_itself = any(isinstance(each, ast.Name) and each.id == node.name for each in ast.walk(value))
            if calls_itself or not any(map(is_part, lists)):
                return None
            return names, defaults_of(node.args), value
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            if not note_part(parts, target, statement.value) and isinstance(target, ast.Name):
                parts.parts[target.id] = resolved(parts, statement.value)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            note_added(parts, statement.value)
        elif not isinstance(statement, (ast.Pass, ast.Import, ast.ImportFrom, ast.Expr)):
            return None
    return None


def resolved(scope: Scope, node: ast.expr, depth: int = 0) -> ast.expr:
    """An expression with the parts that its variables hold and its functions return."""
    return _Resolved(scope, depth).visit(replaced(node, scope.parts)) if depth < DEPTH else node


class _Resolved(ast.NodeTransformer):
    def __init__(self, scope: Scope, depth: int) -> None:
        self.scope, self.depth = scope, depth

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        found = self.scope.functions.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if found is None:
            return node
        names, defaults, value = found
        given = {
            **defaults,
            **dict(zip(names, node.args, strict=False)),
            **{str(each.arg): each.value for each in node.keywords},
        }
        return resolved(self.scope, replaced(value, given), self.depth + 1)


def model_base(name: str, classes: Mapping[str, object]) -> str:
    """The last word of the name of a model's configuration; "" if it is something else."""
    kind = name.split(".")[-1]
    return kind if kind in classes or re.fullmatch(r"[A-Z]\w*?Config\w*", kind) else ""


def model_of(node: ast.expr, classes: Mapping[str, tuple[str, list[ast.keyword]]]) -> tuple[str, list[ast.keyword]]:
    """The name of the recipe of a model, and the fields of its configuration that are set.

    Args:
        classes: the script's own classes of configurations: what each is based on, and its fields.

    ``llm.LlamaModel(llm.Llama3Config8B(seq_length=8192))`` is ``llama3_8b``; so is ``llm.llama3_8b.model()``. A
    `GPTConfig` is of GPT-2's kind.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "model":
        return last_name(node.func.value), []
    for each in ast.walk(node):
        if not isinstance(each, (ast.Call, ast.Name, ast.Attribute)):
            continue
        kind, bare = made_by(each) if isinstance(each, ast.Call) else (last_name(each), None)
        fields = list(bare.keywords) if bare is not None else []
        bases = set[str]()
        while kind in classes and kind not in bases:  # one may be named as its base is
            bases.add(kind)
            kind, more = classes[kind]
            fields = [*(one for one in more if one.arg not in {field.arg for field in fields}), *fields]
        if kind == "GPTConfig":
            return "gpt2_124m", fields
        if match := re.fullmatch(r"([A-Z]\w*?)Config(\w*)", kind):
            name, size = match[1].lower(), match[2].lower()
            return f"{name}_{size}" if size else name, fields
    return "", []
