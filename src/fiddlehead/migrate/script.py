"""Walks through a NeMo 2.0 script in its order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from copy import copy, deepcopy

from fiddlehead.errors import ConfigError
from fiddlehead.migrate.executors import CHANGES, change, note_executor
from fiddlehead.migrate.fields import PARTS, edit
from fiddlehead.migrate.models import begin_recipe, begin_task, task_of
from fiddlehead.migrate.parts import is_part, model_base, note_added, note_part, part_function, resolved
from fiddlehead.migrate.plugins import note_plugins
from fiddlehead.migrate.report import Migrated
from fiddlehead.migrate.scope import CONFIGS, METHODS, RECIPES, SAFE, Scope, defaults_of, is_name
from fiddlehead.migrate.simplify import simplified
from fiddlehead.migrate.starts import EXPERIMENT, Starts
from fiddlehead.migrate.writer import executor_text, launch_text, recipe_text, used_parameters
from fiddlehead.recipe import catalog

WRITTEN = {"Recipe", "LoRA", "fdl"}
"""Names that recipe files import besides recipes."""


def migrate(text: str, name: str) -> Migrated:
    """Rewrites a script.

    Args:
        name: of the recipe that the top level of the script becomes.

    Raises:
        ConfigError: it is not valid Python, or makes no recipe.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"it is not valid Python: {error}") from error
    name = re.sub(r"\W", "_", name)
    return Script(tree, name if is_name(name) else f"run_{name}").migrated()


class Script:
    """What is known of a script so far."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        self.tree, options, defaults = simplified(tree, {each.name for each in catalog.recipes()} | WRITTEN)
        self.name = name
        self.out = Migrated()
        self.recipes: dict[str, Scope] = {}
        self.executors: dict[str, str] = {}
        self.constants: list[str] = []
        self.top = Scope(name, self.out, known={*SAFE, *options}, literals=dict(defaults))
        self.top.parameters = ast.unparse(
            ast.arguments([], [], None, list(options.values()), [defaults.get(each) for each in options], None, [])
        )
        self.parameters: dict[str, list[str]] = {}
        self.helpers: set[str] = set()
        self.classes: dict[str, tuple[str, list[ast.keyword]]] = {}
        self.starts = Starts(self)

    def migrated(self) -> Migrated:
        """The files and the report."""
        last = []
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                self._function(node)
            elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
                last += node.body
            elif isinstance(node, ast.Assign) and self._is_constant(node):
                self.constants.append(ast.unparse(node))
                self.top.known |= {ast.unparse(each) for each in node.targets}
                self.top.literals[ast.unparse(node.targets[0])] = node.value
            elif isinstance(node, ast.ClassDef):
                self._class(node)
            elif not isinstance(node, (ast.Import, ast.ImportFrom)):
                last.append(node)
        self._finish(self.top, last)
        if not self.recipes and not self.out.steps:
            raise ConfigError("no line of it makes a recipe, such as llm.llama3_8b.pretrain_recipe(...)")
        self.starts.begin_with_imported()
        self.out.recipe = recipe_text(self.recipes, self.constants) if self.recipes else ""
        self.out.launch = launch_text(self.executors.values(), self.constants)
        self.starts.commands()
        self.out.lines.sort(key=lambda line: line[0])
        return self.out

    def _is_constant(self, node: ast.Assign) -> bool:
        return all(isinstance(each, ast.Name) for each in node.targets) and self.top.is_plain(node.value)

    # -- its parts

    def _class(self, node: ast.ClassDef) -> None:
        bases = [ast.unparse(each) for each in node.bases]
        base = next((name for each in bases if (name := model_base(each, self.classes))), "")
        if not base:
            self.out.say(node, f"a class of your own ({', '.join(bases)}): move it to a module; --allow names it")
            return
        fields = [
            ast.copy_location(ast.keyword(ast.unparse(each.targets[0]), each.value), each)
            for each in node.body
            if isinstance(each, ast.Assign)
        ]
        self.classes[node.name] = (base, fields)
        self.out.say(node, "its fields are lines of the recipes of its model")

    def _function(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        names = [each.arg for each in (*arguments.args, *arguments.kwonlyargs)]
        bare = deepcopy(arguments)
        for each in (*bare.args, *bare.kwonlyargs):
            if each.annotation is not None and not self.top.is_plain(each.annotation):
                each.annotation = None
        self.parameters[node.name] = names
        scope = Scope(node.name, self.out, known=self.top.known | set(names), functions=self.top.functions)
        defaults = defaults_of(bare)
        if not all(map(self.top.is_plain, defaults.values())):
            self.out.say(node, "left out: the files do not know its default values")
            return
        scope.parameters = ast.unparse(bare)
        scope.literals = {**self.top.literals, **defaults}
        if given := _changed_recipe(node, names):
            self._helper(scope, given, bare)
        elif returned := part_function(scope, node):
            self.top.functions[node.name] = returned
            return
        self._finish(scope, node.body)

    def _helper(self, scope: Scope, given: str, arguments: ast.arguments) -> None:
        """A function that changes a recipe that it is given."""
        for each in (*arguments.args, *arguments.kwonlyargs):
            if each.arg == given:
                each.arg, each.annotation = "recipe", ast.Name("Recipe")
        scope.parameters, scope.variable, scope.is_helper, scope.edited = ast.unparse(arguments), given, True, True
        scope.known -= {given}
        self.helpers.add(scope.name)

    def _finish(self, scope: Scope, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(scope, statement)
        if scope.variable and scope.edited:
            self.recipes[scope.name] = scope
        for made in scope.executors.values():
            self.executors[made.function] = executor_text(scope, made)
            if scope is self.top:
                self.parameters[made.function] = used_parameters(self.executors[made.function])

    def _statement(self, scope: Scope, node: ast.stmt) -> None:
        if isinstance(node, (ast.With, ast.Try)):
            for each in node.items if isinstance(node, ast.With) else ():
                self._call(scope, each.context_expr)
            after = [*node.orelse, *node.finalbody] if isinstance(node, ast.Try) else []
            for each in [*node.body, *after]:
                self._statement(scope, each)
            for each in node.handlers if isinstance(node, ast.Try) else ():
                self.out.say(each, "left out: what is done after an error")
        elif isinstance(node, (ast.If, ast.For)):
            self._block(scope, node)
        elif isinstance(node, ast.While):
            self.out.say(node, "not migrated: write it as lines of the recipe" if _about(scope, node) else "left out")
        elif isinstance(node, ast.Expr):
            self._call(scope, node.value)
        elif isinstance(node, ast.Return):
            if isinstance(node.value, ast.Call):
                self.made(scope, node.value, "recipe" if _makes_recipe(node.value) else "executor")
        elif isinstance(node, ast.Assign):
            self._assign(scope, node, node.targets[0], scope.reads(node.value))
        elif not isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom, ast.FunctionDef)):
            self.out.say(node, "left out")

    def _block(self, scope: Scope, node: ast.If | ast.For) -> None:
        """A condition or a loop: the same one around its lines, if the files know what it asks for."""
        asked = scope.reads(node.test if isinstance(node, ast.If) else node.iter)
        is_plain, said = scope.is_plain(asked), list(self.out.lines)
        head = f"if {ast.unparse(asked)}:"
        if isinstance(node, ast.For):
            head = f"for {ast.unparse(node.target)} in {ast.unparse(asked)}:"
            scope.known |= {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)}
        first = self._branch(scope, node.body)
        second = self._branch(scope, node.orelse)
        found = False
        for lines, inner, other in zip(scope.lines(), first, second, strict=False):
            if not inner and not other:
                continue
            found = True
            if is_plain:
                text = "\n".join([head, *_indented(inner or ["pass"])])
                lines.append(text + ("\n".join(["\nelse:", *_indented(other)]) if other else ""))
        if found and not is_plain:
            self.out.lines[:] = said
            self.out.say(node, "not migrated: write it as lines of the recipe" if _about(scope, node) else "left out")

    def _branch(self, scope: Scope, statements: list[ast.stmt]) -> list[list[str]]:
        """The lines that statements add, which are taken off again."""
        before = [len(lines) for lines in scope.lines()]
        for each in statements:
            self._statement(scope, each)
        found = []
        for lines, count in zip(scope.lines(), before, strict=False):
            found.append(lines[count:])
            del lines[count:]
        return found

    def _assign(self, scope: Scope, node: ast.Assign, target: ast.expr, value: ast.expr) -> None:
        path = ast.unparse(target)
        root = path.split(".")[0].split("[")[0]
        is_field = bool(scope.variable) and root == scope.variable and path != root
        if isinstance(target, ast.Name) and isinstance(value, ast.Call) and self.made(scope, value, path):
            return
        if isinstance(target, ast.Name) and note_plugins(scope, path, value):
            self.out.say(node, "plugins: see where they are used")
        elif is_field:
            edit(scope, node, path.partition(".")[2], resolved(scope, value))
        elif root in scope.executors and path != root:
            self.out.say(node, change(scope, node, root, target, [value]))
        elif root in scope.aliases and path != root:
            function = ast.unparse(scope.aliases[root][-1].func)
            self.out.say(node, f"not migrated: set it in {function} of launch/{self.name}.py")
        elif note_part(scope, target, value):
            return
        elif scope.is_plain(value) and (isinstance(target, ast.Name) or root in scope.known):
            scope.known.add(root)
            if isinstance(target, ast.Name):
                scope.literals[path] = value
            scope.keep(f"{path} = {ast.unparse(value)}")
        elif isinstance(target, ast.Name):
            scope.known.discard(path)
            self.out.say(node, "left out")
        else:
            self.out.say(node, "left out")

    # -- what calls make

    def made(self, scope: Scope, call: ast.Call, variable: str) -> bool:
        """Notes the recipe, the executor or the weights that a call makes; False if it makes none."""
        called = ast.unparse(call.func).split(".")
        alone = scope is not self.top and not scope.variable and not scope.executors
        if note_executor(scope, call, variable, scope.name if alone else f"{scope.name}_{variable}"):
            self.out.say(call, f"an executor of launch/{self.name}.py, as it is")
        elif called[-1] in CONFIGS and call.args and ast.unparse(call.args[0]).endswith(("import_ckpt", "export_ckpt")):
            self.starts.convert(call, ast.unparse(call.args[0]).split(".")[-1])
        elif len(called) == 1 and called[0] in self.executors:
            scope.aliases.setdefault(variable, []).append(call)
            self.out.say(call, f"{called[0]} of launch/{self.name}.py; its arguments are executor.NAME=VALUE, typed")
        elif len(called) == 1 and called[0] in self.helpers:
            self._help(scope, call, variable)
        elif len(called) == 1 and called[0] in self.recipes:
            self._relay(scope, call, variable, self.recipes[called[0]])
        elif _makes_recipe(call):
            self._next(scope)
            begin_recipe(scope, call, variable, *called[-2:])
        elif task := task_of(call):
            self._next(scope)
            begin_task(scope, call, variable, task, self.classes)
        else:
            return False
        return True

    def _next(self, scope: Scope) -> None:
        """Ends the recipe that the lines up to here make, if they make one: another one begins."""
        if not scope.variable or not scope.edited or not any(line.startswith("recipe = ") for line in scope.body):
            return
        self.recipes[scope.name] = copy(scope)
        scope.numbered += 1
        base = re.sub(r"_\d+$", "", scope.name) if scope.numbered > 2 else scope.name
        scope.name, scope.body, scope.unsure = f"{base}_{scope.numbered}", [], set()

    def _relay(self, scope: Scope, call: ast.Call, variable: str, recipe: Scope) -> None:
        """A recipe that a function of the script makes."""
        self._next(scope)
        scope.variable, scope.sample, scope.unsure = variable, deepcopy(recipe.sample), set(recipe.unsure)
        scope.edited = bool(call.args or call.keywords) and scope is not self.top
        scope.relayed = (recipe.name, call)
        names = self.parameters[recipe.name]
        given = {**dict(zip(names, call.args, strict=False)), **{each.arg: each.value for each in call.keywords}}
        for name, path in recipe.sizes.items():
            if name in given:
                scope.note(path, ast.unparse(given[name]))
        scope.body += scope.kept
        scope.body.append(f"recipe = {recipe.name}({', '.join(scope.arguments(call, names))})")

    def _help(self, scope: Scope, call: ast.Call, variable: str) -> None:
        """A function of the script's that changes the recipe."""
        arguments = [
            "recipe" if isinstance(each, ast.Name) and each.id == scope.variable else ast.unparse(scope.reads(each))
            for each in call.args
        ]
        plain = all(scope.is_plain(scope.reads(each)) for each in call.args if ast.unparse(each) != scope.variable)
        named = [each for each in call.keywords if each.arg]
        if "recipe" not in arguments or not plain or not all(scope.is_plain(scope.reads(each.value)) for each in named):
            self.out.say(call, "not migrated: the recipe does not know its arguments; call it in the recipe")
            return
        arguments += [f"{each.arg}={ast.unparse(scope.reads(each.value))}" for each in named]
        scope.body.append(f"{ast.unparse(call.func)}({', '.join(arguments)})")
        scope.edited, scope.variable = True, scope.variable if variable in ("executor", "recipe") else variable
        self.out.say(call, "the same call, in the recipe")

    # -- calls that are statements

    def _call(self, scope: Scope, node: ast.expr) -> None:
        """A call that starts something, or adds to something."""
        if not isinstance(node, ast.Call):
            return
        called = ast.unparse(node.func)
        root, last = called.split(".")[0].split("[")[0], called.split(".")[-1]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in ("run.run", "exp.add", "experiment.add") or (last == "add" and "executor" in given):
            self.starts.start(scope, node, given)
        elif last in ("import_ckpt", "export_ckpt"):
            self.starts.convert(node, last)
        elif last == "add_argument":
            self.out.say(node, "an option: a parameter of the functions that use it")
        elif last == "Experiment":
            self.out.say(node, EXPERIMENT)
        elif task_of(node):
            self.made(scope, node, "recipe")
            self.starts.started.append((scope.name, "", ""))
        elif last in self.helpers and scope.variable:
            self._help(scope, node, scope.variable)
        elif last in ("run", "dryrun", "parse_args") or last in self.recipes:
            self.out.say(node, "left out: the command starts it")
        elif root in scope.plugins and last in CHANGES and all(note_plugins(scope, root, each) for each in node.args):
            self.out.say(node, "plugins: see where they are used")
        elif root in scope.executors and last in CHANGES and not node.keywords:
            self.out.say(node, change(scope, node, root, node.func, node.args))
        elif scope.variable and called.startswith(f"{scope.variable}."):
            path = called.removeprefix(f"{scope.variable}.")
            value = resolved(scope, scope.reads(node.args[0] if node.args else node))
            method = last if last in ("append", "extend") else ""
            edit(scope, node, path.removesuffix(f".{method}"), value, method=method)
        elif not note_added(scope, node):
            if root in scope.known and last in METHODS and scope.is_plain(scope.reads(node)):
                scope.keep(ast.unparse(scope.reads(node)))
            else:
                self.out.say(node, "left out")


def _changed_recipe(node: ast.FunctionDef, names: list[str]) -> str:
    """The parameter of a function that is a recipe, whose fields it sets; "" if there is none."""
    for each in ast.walk(node):
        target = each.targets[0] if isinstance(each, ast.Assign) else each.func if isinstance(each, ast.Call) else None
        words = ast.unparse(target).split(".") if isinstance(target, ast.Attribute) else []
        if len(words) > 1 and words[0] in names and words[1] in (*PARTS, "peft") and words[1] not in RECIPES:
            return words[0]
    return ""


def _about(scope: Scope, node: ast.stmt) -> bool:
    return bool(scope.variable) and bool(re.search(rf"\b{scope.variable}\.", ast.unparse(node)))


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for each in lines for line in each.split("\n")]


def _makes_recipe(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in RECIPES and not is_part(call)
