"""Walks through a NeMo 2.0 script in its order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.migrate.executors import CHANGES, change, note_executor
from fiddlehead.migrate.fields import edit, weights
from fiddlehead.migrate.plugins import note_plugins, take_plugins
from fiddlehead.migrate.report import Migrated
from fiddlehead.migrate.scope import CONFIGS, SAFE, Scope
from fiddlehead.migrate.starts import EXPERIMENT, words_of_call
from fiddlehead.migrate.writer import executor_text, launch_text, recipe_text
from fiddlehead.recipe import catalog

RECIPES = ("pretrain_recipe", "finetune_recipe")
RENAMED = {
    "phi3_mini_4k_instruct": "phi3_mini",
    "mistral_nemo_base_12b": "mistral_nemo_12b",
    "mixtral_8x7b_16k": "mixtral_8x7b",
}
"""NeMo's recipes that have another name here."""


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
    return _Script(tree, re.sub(r"\W", "_", name)).migrated()


class _Script:
    """What is known of a script so far."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        self.tree, self.name = tree, name
        self.out = Migrated()
        self.recipes: dict[str, Scope] = {}
        self.executors: dict[str, str] = {}
        self.constants: list[str] = []
        self.top = Scope(name, self.out, known=set(SAFE))
        self.started: dict[str, str] = {}
        self.parameters: dict[str, list[str]] = {}
        self.relayed: dict[str, str] = {}
        self.imported: list[str] = []

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
            elif isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                self.out.say(node, f"a class of your own ({bases}): move it to a module; --allow names it")
            elif not isinstance(node, (ast.Import, ast.ImportFrom)):
                last.append(node)
        self._finish(self.top, last)
        if not self.recipes:
            raise ConfigError("no line of it makes a recipe, such as llm.llama3_8b.pretrain_recipe(...)")
        self._begin_with_imported()
        self.out.recipe = recipe_text(self.recipes, self.constants)
        self.out.launch = launch_text(self.executors.values(), self.constants)
        self._commands()
        self.out.lines.sort(key=lambda line: line[0])
        return self.out

    def _is_constant(self, node: ast.Assign) -> bool:
        return all(isinstance(each, ast.Name) for each in node.targets) and self.top.is_plain(node.value)

    # -- its parts

    def _function(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        bare = ast.parse(ast.unparse(arguments).join(("def f(", "): ..."))).body[0].args  # type: ignore[attr-defined]
        for each in (*bare.posonlyargs, *bare.args, *bare.kwonlyargs):
            if each.annotation is not None and not self.top.is_plain(each.annotation):
                each.annotation = None
        self.parameters[node.name] = names
        self._finish(Scope(node.name, self.out, ast.unparse(bare), self.top.known | set(names)), node.body)

    def _finish(self, scope: Scope, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(scope, statement)
        if scope.variable and scope.edited:
            self.recipes[scope.name] = scope
        for made in scope.executors.values():
            self.executors[made.function] = executor_text(scope, made)

    def _statement(self, scope: Scope, node: ast.stmt) -> None:
        if isinstance(node, ast.With):
            for each in node.items:
                self._call(scope, each.context_expr)
            for each in node.body:
                self._statement(scope, each)
        elif isinstance(node, (ast.If, ast.For, ast.While, ast.Try)):
            about = scope.variable and re.search(rf"\b{scope.variable}\.", ast.unparse(node))
            self.out.say(node, "not migrated: write it as lines of the recipe" if about else "left out")
        elif isinstance(node, ast.Expr):
            self._call(scope, node.value)
        elif isinstance(node, ast.Return):
            if isinstance(node.value, ast.Call):
                self._made(scope, node.value, "recipe" if _makes_recipe(node.value) else "executor")
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._assign(scope, node, node.targets[0], node.value)
        elif not isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)):
            self.out.say(node, "left out")

    def _assign(self, scope: Scope, node: ast.stmt, target: ast.expr, value: ast.expr) -> None:
        path = ast.unparse(target)
        root = path.split(".")[0].split("[")[0]
        if isinstance(target, ast.Name) and isinstance(value, ast.Call) and self._made(scope, value, path):
            return
        if isinstance(target, ast.Name) and note_plugins(scope, path, value):
            self.out.say(node, "plugins: see where they are used")
            return
        if scope.variable and root == scope.variable and path != root:
            edit(scope, node, path.partition(".")[2], value)
        elif root in scope.executors and path != root:
            self.out.say(node, change(scope, node, root, target, [value]))
        elif root in scope.aliases and path != root:
            function = ast.unparse(scope.aliases[root].func)
            self.out.say(node, f"not migrated: set it in {function} of launch/{self.name}.py")
        elif isinstance(target, ast.Name) and scope.is_plain(value):
            scope.known.add(path)
            scope.kept.append(ast.unparse(node))
        else:
            self.out.say(node, "left out")

    # -- what calls make

    def _made(self, scope: Scope, call: ast.Call, variable: str) -> bool:
        """Notes the recipe, the executor or the weights that a call makes; False if it makes none."""
        called = ast.unparse(call.func).split(".")
        alone = scope is not self.top and not scope.variable and not scope.executors
        if note_executor(scope, call, variable, scope.name if alone else f"{scope.name}_{variable}"):
            self.out.say(call, f"an executor of launch/{self.name}.py, as it is")
        elif called[-1] in CONFIGS and call.args and ast.unparse(call.args[0]).endswith("import_ckpt"):
            self._import(scope, call)
        elif len(called) == 1 and called[0] in self.executors:
            scope.aliases[variable] = call
            self.out.say(call, f"{called[0]} of launch/{self.name}.py; its arguments are executor.NAME=VALUE, typed")
        elif len(called) == 1 and called[0] in self.recipes:
            scope.variable, scope.sample = variable, self.recipes[called[0]].sample
            scope.edited = bool(call.args or call.keywords)
            self.relayed[scope.name] = called[0]
            scope.imports |= self.recipes[called[0]].imports
            self._begin(scope, call, called[0])
        elif _makes_recipe(call):
            self._recipe(scope, call, variable, *called[-2:])
        else:
            return False
        return True

    def _recipe(self, scope: Scope, call: ast.Call, variable: str, model: str, kind: str) -> None:
        """The first line of a recipe, which a function of NeMo's makes."""
        ours = RENAMED.get(model, model)
        entry = next((each for each in catalog.recipes() if each.name == ours), None)
        if entry is None:
            names = [each.name for each in catalog.recipes()]
            raise ConfigError(Problem.in_file(f"line {call.lineno}", Problem.unknown("", model, "model", names)))
        function = getattr(entry.load(), kind, None)
        if function is None:
            raise ConfigError(Problem.in_file(f"line {call.lineno}", f"{ours} has no {kind}"))
        scope.variable, scope.sample, scope.edited = variable, function(), True
        scope.imports.add(f"from {entry.module} import {ours}")
        self._begin(scope, call, f"{ours}.{kind}")
        self.out.say(call, f"{ours}.{kind} of {entry.module}")

    def _begin(self, scope: Scope, call: ast.Call, function: str) -> None:
        taken = []
        for keyword in call.keywords:
            if keyword.arg and scope.is_plain(keyword.value):
                taken.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
            else:
                self.out.say(keyword, "set it yourself; the recipe does not know its value")
        taken = [ast.unparse(each) for each in call.args] + taken
        scope.body += [*scope.kept, f"recipe = {function}({', '.join(taken)})"]

    # -- calls that are statements

    def _call(self, scope: Scope, node: ast.expr) -> None:
        """A call that starts something, or adds to something."""
        if not isinstance(node, ast.Call):
            return
        called = ast.unparse(node.func)
        root, last = called.split(".")[0].split("[")[0], called.split(".")[-1]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in ("run.run", "exp.add", "experiment.add") or (last == "add" and "executor" in given):
            self._start(scope, node, given)
        elif last == "import_ckpt":
            self._import(scope, node)
        elif last == "Experiment":
            self.out.say(node, EXPERIMENT)
        elif last in ("run", "dryrun", "parse_args") or last in self.recipes:
            self.out.say(node, "left out: the command starts it")
        elif root in scope.plugins and last in CHANGES and all(note_plugins(scope, root, each) for each in node.args):
            self.out.say(node, "plugins: see where they are used")
        elif root in scope.executors and last in CHANGES and not node.keywords:
            self.out.say(node, change(scope, node, root, node.func, node.args))
        elif scope.variable and called.startswith(f"{scope.variable}."):
            path = called.removeprefix(f"{scope.variable}.")
            value = node.args[0] if node.args else node
            edit(scope, node, path.removesuffix(".append").removesuffix(".extend"), value)
        else:
            self.out.say(node, "left out")

    def _start(self, scope: Scope, node: ast.Call, given: dict[str | None, ast.expr]) -> None:
        first = node.args[0] if node.args else ast.Name(scope.variable)
        what = ast.unparse(first.func if isinstance(first, ast.Call) else first)
        self.started[scope.name if what == scope.variable else what] = self._executor(scope, given.get("executor"))
        self.out.say(node, "a command; see below")
        if "plugins" in given:
            executor = given.get("executor")
            made = scope.executors.get(executor.id) if isinstance(executor, ast.Name) else None
            take_plugins(scope, self._scope_of(scope, what), made, given["plugins"])

    def _scope_of(self, scope: Scope, name: str) -> Scope | None:
        """The scope whose lines make the recipe of this name in `scope`; None if there is none."""
        if name == scope.variable and (scope.edited or scope.name not in self.relayed):
            return scope
        return self.recipes.get(self.relayed.get(scope.name, "") if name == scope.variable else name)

    def _import(self, scope: Scope, call: ast.Call) -> None:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        source = getattr(given.get("source"), "value", None)
        if isinstance(source, str):
            self.imported.append(weights(scope, source))
        known = isinstance(source, str) and "://" in source
        self.out.say(call, "a command; see below" if known else "fiddlehead import hf SOURCE --out DIR")

    def _executor(self, scope: Scope, given: ast.expr | None) -> str:
        """The words of a command that name the executor."""
        if isinstance(given, ast.Call):
            variable = "executor" if "executor" not in scope.executors else f"executor_{given.lineno}"
            if note_executor(scope, given, variable, f"{scope.name}_{variable}"):
                self.out.say(given, f"an executor of launch/{self.name}.py, as it is")
                given = ast.Name(variable)
        if isinstance(given, ast.Name) and given.id in scope.executors:
            return f"executor={scope.executors[given.id].function}"
        call = scope.aliases.get(given.id) if isinstance(given, ast.Name) else given
        if not isinstance(call, ast.Call) or (name := ast.unparse(call.func)) not in self.executors:
            return ""
        return f"executor={name} {words_of_call(call, self.parameters[name])}".strip()

    # -- in the end

    def _begin_with_imported(self) -> None:
        """Fine-tuning begins with the weights that the script imports: NeMo's recipes name them themselves."""
        for scope in self.recipes.values():
            tunes = scope.sample is not None and scope.sample.__fn_or_cls__.__name__ == "finetune"
            if tunes and len(self.imported) == 1 and not any("model.init_from =" in line for line in scope.body):
                scope.put("model.init_from", repr(self.imported[0]))

    def _commands(self) -> None:
        found = {name if name in self.recipes else self.relayed.get(name, ""): e for name, e in self.started.items()}
        started = {name: words for name, words in found.items() if name in self.recipes}
        for name, words in (started or {list(self.recipes)[-1]: ""}).items():
            scope = self.recipes[name]
            lines = "\n".join(scope.body)
            task = "pretrain" if scope.sample is None else scope.sample.__fn_or_cls__.__name__
            has_data = "recipe.data.paths =" in lines or getattr(scope.sample and scope.sample.data, "corpus", None)
            data = "" if has_data else f" data.paths={'TOKENS' if task == 'pretrain' else 'EXAMPLES'}"
            beginning = "" if task == "pretrain" or "recipe.model.init_from =" in lines else " model.init_from=WEIGHTS"
            self.out.step(f"fiddlehead {task} {name}{data}{beginning}{words and ' '}{words}")


def _makes_recipe(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in RECIPES and "." in ast.unparse(call.func.value)
