"""Options of a script's command line (argparse), as parameters of its functions."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set

from fiddlehead.migrate.scope import is_name, last_name

TAKEN = ("recipe", "executor", "run", "fdl", "llm")
"""Names that the files have for something else."""
_OFF = {"store_true": False, "store_false": True, "count": 0}


def take_options(tree: ast.Module) -> tuple[ast.Module, dict[str, ast.arg], dict[str, ast.expr]]:
    """The tree with ``lr`` for ``args.lr``, a parameter of each function that uses it.

    Returns:
        the tree, and by name the options as parameters and their default values, for those that have one.
    """
    options, defaults, names = dict[str, ast.arg](), dict[str, ast.expr](), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and last_name(node.func) == "add_argument" and (option := _option(node)):
            name, kind, default = option
            names[name] = f"{name}_name" if name in TAKEN else name
            options[names[name]] = ast.arg(names[name], ast.Name(kind) if kind else None)
            if default is not None:
                defaults[names[name]] = default
    holders = _holders(tree) if options else set()
    if not holders:
        return tree, {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            _take(node, holders, names, options, defaults)
    return _Plain(holders, names).visit(tree), options, defaults


def _option(call: ast.Call) -> tuple[str, str, ast.expr | None] | None:
    """The name of an option, the name of its type, and its default value."""
    given = {each.arg: each.value for each in call.keywords}
    flags = [str(each.value) for each in call.args if isinstance(each, ast.Constant)]
    name = str(getattr(given.get("dest"), "value", "")) or next((f for f in flags if f.startswith("--")), "")
    name = (name or (flags or [""])[0]).lstrip("-").replace("-", "_")
    if not is_name(name):
        return None
    action = getattr(given.get("action"), "value", "")
    kind = ast.unparse(given["type"]) if "type" in given and "nargs" not in given else ""
    default = given.get("default", ast.Constant(_OFF[action]) if action in _OFF else None)
    optional = any(flag.startswith("-") for flag in flags) and not getattr(given.get("required"), "value", False)
    if default is None and optional:
        default = ast.Constant(None)
    is_none = isinstance(default, ast.Constant) and default.value is None
    return name, kind if kind in ("int", "float", "str") and not is_none else "", default


def _holders(tree: ast.Module) -> set[str]:
    """The variables that hold what was parsed."""
    calls = {"parse_args", "parse_known_args"}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
            if any(isinstance(each, ast.Call) and last_name(each.func) in calls for each in returned):
                calls.add(node.name)
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and last_name(node.value.func) in calls:
            for each in node.targets:
                first = each.elts[0] if isinstance(each, ast.Tuple) else each
                found |= {first.id} if isinstance(first, ast.Name) else set()
    return found


def _take(
    node: ast.FunctionDef,
    holders: Set[str],
    names: Mapping[str, str],
    options: Mapping[str, ast.arg],
    defaults: Mapping[str, ast.expr],
) -> None:
    """Gives a function a parameter for each option that it uses, instead of one for all."""
    used = {names[each.attr] for each in ast.walk(node) if _is_option(each, holders, names)}  # type: ignore[attr-defined]
    arguments = node.args
    if not arguments.defaults:
        arguments.args = [each for each in arguments.args if each.arg not in holders]
    there = {each.arg for each in (*arguments.args, *arguments.kwonlyargs)}
    for name in sorted(used - there, key=list(options).index):
        arguments.kwonlyargs.append(options[name])
        arguments.kw_defaults.append(defaults.get(name))


def _is_option(node: ast.AST, holders: Set[str], names: Mapping[str, str]) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in holders
        and node.attr in names
    )


class _Plain(ast.NodeTransformer):
    """``lr`` for ``args.lr``; what is parsed is not given to functions."""

    def __init__(self, holders: Set[str], names: Mapping[str, str]) -> None:
        self.holders, self.names = holders, names

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if _is_option(node, self.holders, self.names):
            return ast.copy_location(ast.Name(self.names[node.attr], node.ctx), node)
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        node.args = [each for each in node.args if not (isinstance(each, ast.Name) and each.id in self.holders)]
        node.keywords = [
            each for each in node.keywords if not (isinstance(each.value, ast.Name) and each.value.id in self.holders)
        ]
        return node
