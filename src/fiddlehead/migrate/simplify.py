"""A script's tree in a simpler form, before its lines are read: the same runs, said with fewer of Python's means."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping, Set
from copy import deepcopy
from typing import Any, TypeVar

from fiddlehead.migrate.options import take_options
from fiddlehead.migrate.scope import RECIPES, Replace, defaults_of, is_name, last_name

MAX_ROUNDS = 64
"""A loop over more values than this stays a loop."""
MAX_STATEMENTS = 1000
"""So does one whose rounds are more lines than these."""
Names = Mapping[str, ast.expr]
_Node = TypeVar("_Node", bound=ast.AST)


def simplified(tree: ast.Module, taken: Set[str]) -> tuple[ast.Module, dict[str, ast.arg], dict[str, ast.expr]]:
    """The tree with plain names for options of the command line, and with loops that start jobs written out.

    ``partial(f, a)(b)`` is ``f(a, b)``, ``getattr(llm, "x")`` is ``llm.x``, ``a, b = 1, 2`` is two lines, and a
    function to which a model is given is a function for each model.

    Args:
        taken: names that the files use, to which the script's own get a _ if they are the same.

    Returns:
        the tree, and by name the options of the command line and their default values.
    """
    tree = replaced(tree, _renamed(tree))
    own = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
    own |= {each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    tree = _Freed(own & taken).visit(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):  # parameters are told apart by their names
            node.args, node.posonlyargs = [*node.posonlyargs, *node.args], []
    tree, options, defaults = take_options(tree)
    tree = _OneByOne().visit(tree)
    partials: dict[str, ast.Call] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _is_partial(node.value):
            partials |= {each.id: node.value for each in node.targets if isinstance(each, ast.Name)}
    tree = _Unwrapped(partials).visit(tree)
    tree = _Unrolled({**defaults, **_constants(tree)}).visit(tree)
    tree = _by_model(tree, defaults)
    for node in (tree, *(each for each in tree.body if isinstance(each, ast.FunctionDef))):
        _without_aliases(node)
    return ast.fix_missing_locations(tree), options, defaults


def replaced(node: _Node, names: Names) -> _Node:
    """A copy of a node with expressions in the place of names."""
    return Replace(names).visit(_copied(node))


def _copied(value: Any) -> Any:
    """A copy of a node, or of a list of nodes, with all below it: `deepcopy` takes half as long again."""
    if isinstance(value, list):
        return [_copied(each) for each in value]
    if not isinstance(value, ast.AST):
        return value
    made = type(value).__new__(type(value))
    vars(made).update((name, _copied(each)) for name, each in vars(value).items())
    return made


class _Freed(ast.NodeTransformer):
    """Names of the script's own with a _ behind them."""

    def __init__(self, names: Set[str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id += "_" * (node.id in self.names)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.name += "_" * (node.name in self.names)
        self.generic_visit(node)
        return node


def _renamed(tree: ast.Module) -> dict[str, ast.expr]:
    """What is imported under a name of the script's own: the usual name of it."""
    found = dict[str, ast.expr]()
    for node in ast.walk(tree):
        for each in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            usual = "run" if each.name == "nemo_run" else each.name.split(".")[-1]
            if each.asname and each.asname != usual and "nemo" in ast.unparse(node):
                found[each.asname] = ast.Name(usual, ast.Load())
    return found


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """The lists and mappings of variables that are set once."""
    found, often = dict[str, ast.expr](), set[str]()
    for node in ast.walk(tree):
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if name in found or name in often:
            often.add(name)
        elif isinstance(node, ast.Assign):
            found[name] = node.value
    return {name: value for name, value in found.items() if name not in often}


class _OneByOne(ast.NodeTransformer):
    """``a, b = 1, 2`` and ``a = b = 1`` as two statements; so too an annotated one, without its annotation."""

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        pairs: list[tuple[ast.expr, ast.expr]] = []
        for target in node.targets:
            both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            if both and len(target.elts) == len(node.value.elts):  # type: ignore[attr-defined]
                pairs += zip(target.elts, node.value.elts, strict=True)  # type: ignore[attr-defined]
            else:
                pairs.append((target, node.value))
        return [ast.copy_location(ast.Assign([target], value), node) for target, value in pairs]

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        call = node.value
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "setattr" and len(call.args) == 3:
            owner, name, value = call.args
            if isinstance(name, ast.Constant) and is_name(str(name.value)):
                target = ast.Attribute(owner, str(name.value), ast.Store())
                return ast.copy_location(ast.Assign([target], value), node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        read = deepcopy(node.target)
        read.ctx = ast.Load()
        return ast.copy_location(ast.Assign([node.target], ast.BinOp(read, node.op, node.value)), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        return ast.copy_location(ast.Assign([node.target], node.value), node) if node.value is not None else None


class _Unwrapped(ast.NodeTransformer):
    """Calls of a partial function as calls of the function, and attributes that are named by a text as attributes."""

    def __init__(self, partials: Mapping[str, ast.Call]) -> None:
        self.partials = partials

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | None:
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id in self.partials:
            return None
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        func = node.func
        if isinstance(func, ast.Name) and func.id in self.partials:
            func = self.generic_visit(deepcopy(self.partials[func.id]))
        if isinstance(func, ast.Call) and _is_partial(func):
            given = {each.arg for each in node.keywords}
            kept = [each for each in func.keywords if each.arg not in given]
            node = ast.copy_location(
                ast.Call(func.args[0], [*func.args[1:], *node.args], [*kept, *node.keywords]), node
            )
        return _attribute(node)


def _is_partial(call: ast.Call) -> bool:
    return ast.unparse(call.func) in ("partial", "functools.partial") and bool(call.args)


def _attribute(node: ast.Call) -> ast.expr:
    """``getattr(llm, "x")`` as ``llm.x``."""
    if ast.unparse(node.func) == "getattr" and len(node.args) > 1:
        name = node.args[1]
        if isinstance(name, ast.Constant) and is_name(str(name.value)):
            return ast.copy_location(ast.Attribute(node.args[0], str(name.value), ast.Load()), node)
    return node


class _Unrolled(ast.NodeTransformer):
    """Loops that start jobs, or make recipes, once for each of the values that the script names."""

    def __init__(self, constants: Names) -> None:
        self.constants = constants

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:
        values = list(itertools.islice(self._values(node.iter), MAX_ROUNDS + 1))
        text = ast.unparse(node)
        if node.orelse or any(isinstance(each, ast.Continue | ast.Break) for each in ast.walk(node)):
            return node
        if not values or len(values) > MAX_ROUNDS or not re.search(r"\.add\(|\brun\(|_recipe\(|\bExperiment\(", text):
            return node
        rounds: list[ast.stmt] = []
        for value in values:
            names = _bound(node.target, value)
            if names is None:
                return node
            for each in node.body:
                made = _Unwrapped({}).visit(replaced(each, names))
                done = _Unrolled(self.constants).visit(made)
                rounds += done if isinstance(done, list) else [done]
                if len(rounds) > MAX_STATEMENTS:
                    return node
        return rounds

    def _values(self, node: ast.expr) -> Iterator[ast.expr]:
        if isinstance(node, ast.Name):
            node = self.constants.get(node.id, node)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            yield from node.elts
        elif isinstance(node, ast.Dict):
            yield from (each for each in node.keys if each is not None)
        elif isinstance(node, ast.Call):
            yield from self._called(node)

    def _called(self, node: ast.Call) -> Iterator[ast.expr]:
        name = last_name(node.func)
        if isinstance(node.func, ast.Attribute) and name in ("items", "keys", "values"):
            made = node.func.value
            made = self.constants.get(made.id, made) if isinstance(made, ast.Name) else made
            for key, value in zip(made.keys, made.values, strict=True) if isinstance(made, ast.Dict) else ():
                if key is not None:
                    yield {"items": ast.Tuple([key, value], ast.Load()), "keys": key, "values": value}[name]
        elif name == "range" and all(isinstance(each, ast.Constant) for each in node.args):
            numbers = [each.value for each in node.args if isinstance(each, ast.Constant)]
            if all(isinstance(each, int) for each in numbers) and 0 < len(numbers) < 4 and 0 not in numbers[2:]:
                yield from map(ast.Constant, range(*numbers))  # type: ignore[arg-type]
        elif name == "enumerate" and node.args:
            for number, each in enumerate(self._values(node.args[0])):
                yield ast.Tuple([ast.Constant(number), each], ast.Load())
        elif name in ("zip", "product"):
            together = zip if name == "zip" else itertools.product
            limited = (itertools.islice(self._values(each), MAX_ROUNDS + 1) for each in node.args)
            for each in together(*limited):
                yield ast.Tuple(list(each), ast.Load())


def _bound(target: ast.expr, value: ast.expr) -> dict[str, ast.expr] | None:
    """The names that a loop binds, and their values; None if they cannot be told."""
    if isinstance(target, ast.Name):
        return {target.id: value}
    if not isinstance(target, (ast.Tuple, ast.List)) or not isinstance(value, (ast.Tuple, ast.List)):
        return None
    if len(target.elts) != len(value.elts):
        return None
    found: dict[str, ast.expr] = {}
    for each, part in zip(target.elts, value.elts, strict=True):
        if (names := _bound(each, part)) is None:
            return None
        found |= names
    return found


def _by_model(tree: ast.Module, defaults: Names) -> ast.Module:
    """Functions that are given a model, or its name, as functions without that parameter, one for each model."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    chosen = {name: given for name, node in functions.items() if (given := _model_parameters(node))}
    maker = _Specialised(functions, chosen, defaults)
    body: list[ast.stmt] = []
    for node in tree.body:
        body.append(node if isinstance(node, ast.FunctionDef) and node.name in chosen else maker.visit(node))
    body = [_Unwrapped({}).visit(replaced(node, defaults)) if _names_model(node) else node for node in body]
    for name in chosen:
        if name not in {old for old, _ in maker.made.values()}:
            maker.specialise(name, {})
    made = list(maker.made.values())
    places = {name: [new for old, new in made if old == name] for name in chosen}
    tree.body = []
    for node in body:
        tree.body += places[node.name] if isinstance(node, ast.FunctionDef) and node.name in chosen else [node]
    return tree


def _names_model(node: ast.AST) -> bool:
    return not isinstance(node, ast.FunctionDef) and "getattr(" in ast.unparse(node)


def _model_parameters(node: ast.FunctionDef) -> list[str]:
    """The parameters of a function that are a model, or its name."""
    names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
    found: list[str] = []
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and each.attr in RECIPES and isinstance(each.value, ast.Name):
            found.append(each.value.id)
        elif isinstance(each, ast.Call) and ast.unparse(each.func) == "getattr" and len(each.args) > 1:
            found += [name.id for name in ast.walk(each.args[1]) if isinstance(name, ast.Name)]
    return [name for name in names if name in found]


def _without_aliases(node: ast.Module | ast.FunctionDef) -> None:
    """Puts models in the place of the variables that hold them."""
    names = dict[str, ast.expr]()
    for each in _own(node):
        target = each.targets[0] if isinstance(each, ast.Assign) and isinstance(each.value, ast.Attribute) else None
        if isinstance(target, ast.Name) and ast.unparse(each.value).startswith("llm."):  # type: ignore[attr-defined]
            names[target.id] = each.value  # type: ignore[attr-defined]
    own = [each if isinstance(each, ast.FunctionDef) else replaced(each, names) for each in node.body]
    node.body = own if names else node.body


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, without those of functions and classes in it."""
    for each in ast.iter_child_nodes(node):
        if not isinstance(each, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            yield each
            yield from _own(each)


class _Specialised(ast.NodeTransformer):
    """Calls of functions that are given a model, as calls of functions for that model."""

    def __init__(self, functions: Mapping[str, ast.FunctionDef], chosen: Mapping[str, list[str]], defaults: Names):
        self.functions, self.chosen, self.defaults = functions, chosen, defaults
        self.made: dict[str, tuple[str, ast.FunctionDef]] = {}

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or node.func.id not in self.chosen:
            return node
        old = self.functions[node.func.id]
        names = [each.arg for each in old.args.args]
        given: dict[str, ast.expr] = dict(zip(names, node.args, strict=False))
        given |= {str(each.arg): each.value for each in node.keywords}
        models = {name: value for name in self.chosen[old.name] if (value := given.pop(name, None)) is not None}
        name = self.specialise(old.name, models)
        left = [ast.keyword(key, value) for key, value in given.items()]
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [], left), node)

    def specialise(self, name: str, models: Names) -> str:
        """Makes the function for these models, or those of its defaults, and returns its name."""
        old = deepcopy(self.functions[name])
        arguments = old.args
        known = defaults_of(arguments)
        values = {**self.defaults, **{each: known[each] for each in self.chosen[name] if each in known}, **models}
        values = {each: values[each] for each in self.chosen[name] if each in values}
        word = "_".join(re.sub(r"\W", "_", ast.unparse(each).split(".")[-1].strip("'\"")) for each in models.values())
        new = f"{name}_{word}" if word else name
        if new not in self.made:
            _without(arguments, set(values))
            old.name, old.body = new, [replaced(each, values) for each in old.body]
            self.made[new] = (name, _Unwrapped({}).visit(old))
        return new


def _without(arguments: ast.arguments, names: set[str]) -> None:
    """Takes parameters out of a function."""
    count = len(arguments.args) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [None] * count + list(arguments.defaults)
    pairs = [(each, value) for each, value in zip(arguments.args, defaults, strict=True) if each.arg not in names]
    only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    kept = [(each, value) for each, value in only if each.arg not in names]
    arguments.args, arguments.defaults = [a for a, _ in pairs], [value for _, value in pairs if value is not None]
    arguments.kwonlyargs, arguments.kw_defaults = [a for a, _ in kept], [value for _, value in kept]
