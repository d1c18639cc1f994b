"""What starts a job in a script, as commands."""

from __future__ import annotations

import ast
import re
import shlex
from typing import Protocol

from fiddlehead.migrate.executors import note_executor
from fiddlehead.migrate.fields import weights
from fiddlehead.migrate.plugins import take_plugins
from fiddlehead.migrate.report import Migrated
from fiddlehead.migrate.scope import Scope
from fiddlehead.migrate.writer import parameters

EXPERIMENT = "left out: the commands start the runs; NeMo-Run's experiments also take recipes as they are"


class Script(Protocol):
    """What is known of a script when it starts a job."""

    name: str
    out: Migrated
    top: Scope
    recipes: dict[str, Scope]
    executors: dict[str, str]
    parameters: dict[str, list[str]]

    def made(self, scope: Scope, call: ast.Call, variable: str) -> bool:
        """Notes the recipe or the executor that a call makes; False if it makes none."""
        ...


class Starts:
    """The jobs that a script starts."""

    def __init__(self, script: Script) -> None:
        self.script, self.out = script, script.out
        self.started: list[tuple[str, str, str]] = []
        """Of each job: the recipe's name, the call's arguments, and the words that name the executor."""
        self.imported: list[str] = []

    def start(self, scope: Scope, node: ast.Call, given: dict[str | None, ast.expr]) -> None:
        """Notes the job that ``run.run(recipe)`` or ``experiment.add(recipe)`` starts."""
        first = node.args[0] if node.args else given.get("task", given.get("fn_or_script", ast.Name(scope.variable)))
        is_new = isinstance(first, ast.Call) and ast.unparse(first.func) not in self.script.recipes
        if isinstance(first, ast.Call) and is_new and self.script.made(scope, first, scope.variable or "recipe"):
            first = ast.Name(scope.variable)
        what = ast.unparse(first.func if isinstance(first, ast.Call) else first)
        call = first if isinstance(first, ast.Call) else None
        if what == scope.variable:
            what, call = scope.name, None
            if scope.relayed is not None and not scope.edited:
                what, call = scope.relayed
        if what not in (scope.name, *self.script.recipes):
            self.out.say(node, "left out: it starts no recipe of this script")
            return
        arguments = scope.arguments(call, self.script.parameters[what]) if call is not None else []
        for words in self._executors(scope, given.get("executor")):
            self.started.append((what, ", ".join(arguments), words))
        self.out.say(node, "a command; see below")
        if "plugins" in given:
            executor = given.get("executor")
            made = scope.executors.get(executor.id) if isinstance(executor, ast.Name) else None
            take_plugins(scope, self._scope_of(scope, what), made, given["plugins"])

    def _scope_of(self, scope: Scope, name: str) -> Scope | None:
        """The scope whose lines make the recipe of this name; None if there is none."""
        return scope if name == scope.name and scope.variable else self.script.recipes.get(name)

    def _executors(self, scope: Scope, given: ast.expr | None) -> list[str]:
        """The words of a command that name an executor: of each, where a condition of the script chooses one."""
        if isinstance(given, ast.Call):
            variable = "executor" if "executor" not in scope.executors else f"executor_{given.lineno}"
            if note_executor(scope, given, variable, f"{scope.name}_{variable}"):
                self.out.say(given, f"an executor of launch/{self.script.name}.py, as it is")
                same = [key for key, each in scope.executors.items() if each.lines == scope.executors[variable].lines]
                if same[0] != variable:
                    del scope.executors[variable]
                given = ast.Name(same[0])
        if isinstance(given, ast.IfExp):
            return [*self._executors(scope, given.body), *self._executors(scope, given.orelse)]
        name = given.id if isinstance(given, ast.Name) else ""
        made = [each for key, each in scope.executors.items() if key.split("#")[0] == name]
        words = [f"executor={each.function}" for each in made]
        for call in scope.aliases.get(name, []) if name else [given]:
            if isinstance(call, ast.Call) and (function := ast.unparse(call.func)) in self.script.executors:
                words.append(f"executor={function} {self._words(scope, call, function)}".strip())
        return words or [""]

    def _words(self, scope: Scope, call: ast.Call, function: str) -> str:
        """The words of a command for the literal arguments of an executor's function."""
        pairs = [
            *zip(self.script.parameters[function], call.args, strict=False),
            *((each.arg, each.value) for each in call.keywords if each.arg),
        ]
        words = []
        for key, value in pairs:
            read = scope.reads(value)
            if isinstance(read, ast.Name) and read.id.startswith("recipe."):
                read = scope.known_value(read.id.removeprefix("recipe.")) or read
            try:
                literal = scope.literal(read)
            except ValueError:
                if ast.unparse(value) not in scope.known:
                    self.out.say(value, f"set executor.{key}=VALUE in the command")
                continue
            if isinstance(literal, (dict, list, tuple)) and literal:
                self.out.say(value, f"set it in {function} of launch/{self.script.name}.py")
            elif isinstance(literal, (str, int, float)) and literal != "":
                words.append(f"executor.{key}={shlex.quote(str(literal))}")
        return " ".join(words)

    def convert(self, call: ast.Call, kind: str) -> None:
        """Notes the weights that a script imports or exports."""
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if kind == "export_ckpt":
            path, out = (_text(given.get(each)) for each in ("path", "output_path"))
            target = _text(given.get("target")) or "hf"
            if target != "hf":
                self.out.say(call, f"not migrated: fiddlehead exports to hf, not to {target}")
                return
            folder = re.sub(r"/checkpoints/.*", "", path or "RUN")
            self.out.step(f"fiddlehead export hf {shlex.quote(folder)} --out {shlex.quote(out or 'OUT')}")
            self.out.say(call, f"a command; see below: {folder} is the run here")
            return
        source = _text(given.get("source")) or ""
        if source:
            self.imported.append(weights(self.script.top, source, _text(given.get("output_path"))))
        known = "://" in source
        self.out.say(call, "a command; see below" if known else "fiddlehead import hf SOURCE --out DIR")

    # -- in the end

    def begin_with_imported(self) -> None:
        """Fine-tuning begins with the weights that the script imports: NeMo's recipes name them themselves."""
        for scope in self.script.recipes.values():
            tunes = scope.sample is not None and scope.sample.__fn_or_cls__.__name__ == "finetune"
            begins = any("model.init_from =" in line for line in scope.body)
            if tunes and len(set(self.imported)) == 1 and not begins and not scope.is_helper and not scope.relayed:
                scope.put("model.init_from", repr(self.imported[0]))

    def commands(self) -> None:
        """Adds the commands that do the same as the script."""
        recipes = {name: scope for name, scope in self.script.recipes.items() if not scope.is_helper}
        started = [each for each in dict.fromkeys(self.started) if each[0] in recipes]
        if not started and recipes:
            started = [(list(recipes)[-1], "", "")]
        for name, arguments, words in started:
            scope = recipes[name]
            lines = "\n".join(scope.body)
            base = recipes.get(scope.relayed[0]) if scope.relayed else None
            lines += "\n".join(base.body) if base else ""
            task = "pretrain" if scope.sample is None else scope.sample.__fn_or_cls__.__name__
            has_data = "recipe.data.paths =" in lines or getattr(scope.sample and scope.sample.data, "corpus", None)
            data = "" if has_data else f" data.paths={'TOKENS' if task == 'pretrain' else 'EXAMPLES'}"
            beginning = "" if task == "pretrain" or "recipe.model.init_from =" in lines else " model.init_from=WEIGHTS"
            missing = required_parameters(scope, arguments) if name == scope.name else []
            arguments = ", ".join([*([arguments] if arguments else []), *(f"{each}=..." for each in missing)])
            called = shlex.quote(f"{name}({arguments})") if arguments else name
            self.out.step(f"fiddlehead {task} {called}{data}{beginning}{words and ' '}{words}")


def required_parameters(scope: Scope, arguments: str) -> list[str]:
    """The parameters of a recipe's function that have no default value, and none in `arguments`."""
    made = ast.parse(f"def f({parameters(scope, scope.body)}): ...").body[0].args  # type: ignore[attr-defined]
    call = ast.parse(f"f({arguments})", mode="eval").body
    given = {each.arg for each in call.keywords}  # type: ignore[attr-defined]
    count = len(made.args) - len(made.defaults)
    names = [each.arg for each in made.args[len(call.args) : count]]  # type: ignore[attr-defined]
    names += [each.arg for each, value in zip(made.kwonlyargs, made.kw_defaults, strict=True) if value is None]
    return [name for name in names if name not in given]


def _text(node: ast.expr | None) -> str | None:
    """The text of a literal, or of ``Path("...")``."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        node = node.args[0]
    return str(node.value) if isinstance(node, ast.Constant) else None
