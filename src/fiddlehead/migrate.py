"""Rewrites a NeMo 2.0 script as a recipe file and a launch file. The script is read as text; nothing of it is run."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.launch.docker import DockerExecutor
from fiddlehead.launch.local import LocalExecutor
from fiddlehead.launch.slurm import SlurmExecutor
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipe.nemo_names import NAMES, answer, names_at
from fiddlehead.recipe.slots import find_slot

RECIPES = ("pretrain_recipe", "finetune_recipe")
CONFIGS = ("Config", "Partial")
EXECUTORS = {"LocalExecutor": LocalExecutor, "SlurmExecutor": SlurmExecutor, "DockerExecutor": DockerExecutor}
RENAMED = {
    "phi3_mini_4k_instruct": "phi3_mini",
    "mistral_nemo_base_12b": "mistral_nemo_12b",
    "mixtral_8x7b_16k": "mixtral_8x7b",
}
"""NeMo's recipes that have another name here."""
DATA = {
    "MockDataModule": "random data: `fiddlehead bench --random-tokens` times it; to train, set data.paths",
    "PreTrainingDataModule": "set data.paths to a folder that `fiddlehead tokenize` makes of the text",
    "FineTuningDataModule": "",
}
"""What to do about the data modules of a script; another one's data is downloaded by the user."""
DOWNLOADED = "download its data as JSONL or Parquet, and set data.paths"
NAMED = {name.nemo: name for name in NAMES}
SETTINGS = {"container_image": "container", "num_gpus": "gpus", "volumes": "mounts", "retries": "requeues"}


SAFE = ("abs", "bool", "dict", "float", "int", "len", "list", "max", "min", "range", "round", "str", "sum", "tuple")
"""The functions whose calls a migrated file keeps."""


@dataclass
class Migrated:
    """The files that a script becomes, and what was done with its lines."""

    recipe: str = ""
    launch: str = ""
    lines: list[tuple[int, str, str]] = field(default_factory=list)
    """For each line of the script that matters: its number, what stood there, what has become of it."""
    steps: list[str] = field(default_factory=list)
    """What the user is to do: commands."""

    def say(self, node: ast.AST, done: str) -> None:
        """Records what became of a node of the script."""
        text = ast.unparse(node).split("\n")[0]
        self.lines.append((getattr(node, "lineno", 0), text if len(text) <= 100 else f"{text[:97]}...", done))


@dataclass
class _Scope:
    """The statements of a function of the script, or of its top level, as a recipe or an executor."""

    name: str
    parameters: str = ""
    known: set[str] = field(default_factory=set)
    variable: str = ""
    """The script's name of the recipe."""
    sample: Recipe | None = None
    """The recipe that the first line makes, to see which fields it has."""
    edited: bool = False
    body: list[str] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    executors: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    """For each variable: the kind and the settings."""
    names: dict[str, str] = field(default_factory=dict)
    """For each of these variables: the function of the launch file."""
    aliases: dict[str, ast.Call] = field(default_factory=dict)
    """The variables that a call of an executor's function makes."""
    kept: list[str] = field(default_factory=list)
    """Assignments that an executor may need."""


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
    """Walks through a script in its order."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        self.tree, self.name = tree, name
        self.out = Migrated()
        self.recipes: dict[str, _Scope] = {}
        self.executors: dict[str, str] = {}
        self.constants: list[str] = []
        self.known: set[str] = set(SAFE)
        self.started: dict[str, str] = {}
        self.parameters: dict[str, list[str]] = {}
        self.relayed: dict[str, str] = {}
        self.imported: list[str] = []

    def migrated(self) -> Migrated:
        """The files and the report."""
        top = []
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                self._function(node)
            elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
                top += node.body
            elif isinstance(node, ast.Assign) and self._is_constant(node):
                self.constants.append(ast.unparse(node))
                self.known |= {ast.unparse(each) for each in node.targets}
            elif isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                self.out.say(node, f"a class of your own ({bases}): move it to a module; --allow names it")
            elif not isinstance(node, (ast.Import, ast.ImportFrom)):
                top.append(node)
        self._finish(_Scope(self.name, known=set(self.known)), top)
        if not self.recipes:
            raise ConfigError("no line of it makes a recipe, such as llm.llama3_8b.pretrain_recipe(...)")
        self._write()
        self.out.lines.sort(key=lambda line: line[0])
        return self.out

    def _is_constant(self, node: ast.Assign) -> bool:
        return all(isinstance(each, ast.Name) for each in node.targets) and self._is_plain(node.value, self.known)

    # -- its parts

    def _function(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        bare = ast.parse(ast.unparse(arguments).join(("def f(", "): ..."))).body[0].args  # type: ignore[attr-defined]
        for each in (*bare.posonlyargs, *bare.args, *bare.kwonlyargs):
            if each.annotation is not None and not self._is_plain(each.annotation, self.known):
                each.annotation = None
        self.parameters[node.name] = names
        self._finish(_Scope(node.name, ast.unparse(bare), self.known | set(names)), node.body)

    def _finish(self, scope: _Scope, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(scope, statement)
        if scope.variable and scope.edited:
            self.recipes[scope.name] = scope
        for variable, (kind, settings) in scope.executors.items():
            name = scope.names[variable]
            self.executors[name] = self._executor_text(scope, name, kind, settings)

    def _statement(self, scope: _Scope, node: ast.stmt) -> None:
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
                self._made(scope, node.value, "recipe" if self._makes_recipe(node.value) else "executor")
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._assign(scope, node, node.targets[0], node.value)
        elif not isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)):
            self.out.say(node, "left out")

    def _assign(self, scope: _Scope, node: ast.stmt, target: ast.expr, value: ast.expr) -> None:
        path = ast.unparse(target)
        root = path.split(".")[0].split("[")[0]
        if isinstance(target, ast.Name) and isinstance(value, ast.Call) and self._made(scope, value, path):
            return
        if scope.variable and root == scope.variable and path != root:
            self._edit(scope, node, path.partition(".")[2], value)
        elif root in scope.executors and path != root:
            self._setting(scope, node, root, path[len(root) + 1 :].removeprefix("."), value)
        elif root in scope.aliases and path != root:
            function = ast.unparse(scope.aliases[root].func)
            self.out.say(node, f"not migrated: set it in {function} of launch/{self.name}.py")
        elif isinstance(target, ast.Name) and self._is_plain(value, scope.known):
            scope.known.add(path)
            scope.kept.append(ast.unparse(node))
        else:
            self.out.say(node, "left out")

    def _made(self, scope: _Scope, call: ast.Call, variable: str) -> bool:
        """Notes the recipe or the executor that a call makes; False if it makes neither."""
        called = ast.unparse(call.func).split(".")
        if called[-1] in EXECUTORS:
            alone = scope.name != self.name and not scope.variable and not scope.executors
            scope.names[variable] = scope.name if alone else f"{scope.name}_{variable}"
            scope.executors[variable] = (called[-1], {})
            for keyword in call.keywords:
                self._setting(scope, call, variable, keyword.arg or "**", keyword.value)
            self.out.say(call, f"an executor of launch/{self.name}.py")
            return True
        if called[-1] in CONFIGS and call.args and ast.unparse(call.args[0]).endswith("import_ckpt"):
            self._import(call)
            return True
        if called[-1] in self.executors and len(called) == 1:
            scope.aliases[variable] = call
            self.out.say(call, f"{called[-1]} of launch/{self.name}.py; its arguments are executor.NAME=VALUE, typed")
            return True
        if called[-1] in self.recipes and len(called) == 1:
            scope.variable, scope.sample = variable, self.recipes[called[-1]].sample
            scope.edited = bool(call.args or call.keywords)
            self.relayed[scope.name] = called[-1]
            scope.imports |= self.recipes[called[-1]].imports
            self._begin(scope, call, called[-1])
            return True
        if not self._makes_recipe(call):
            return False
        model, kind = called[-2], called[-1]
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
        return True

    def _begin(self, scope: _Scope, call: ast.Call, function: str) -> None:
        taken = []
        for keyword in call.keywords:
            if keyword.arg and self._is_plain(keyword.value, scope.known):
                taken.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
            else:
                self.out.say(keyword.value, f"{keyword.arg}: set it yourself; its value is not in the recipe")
        taken = [ast.unparse(each) for each in call.args] + taken
        scope.body += [*scope.kept, f"recipe = {function}({', '.join(taken)})"]

    @staticmethod
    def _makes_recipe(call: ast.Call) -> bool:
        return (
            isinstance(call.func, ast.Attribute) and call.func.attr in RECIPES and "." in ast.unparse(call.func.value)
        )

    # -- the fields of a recipe

    def _edit(self, scope: _Scope, node: ast.AST, path: str, value: ast.expr) -> None:
        """One field: as a line of the recipe, or a line of the report."""
        if isinstance(value, ast.Call) and (special := self._special(scope, node, path, value)) is not None:
            self.out.say(node, special)
            return
        named = NAMED.get(path)
        literal = value.value if isinstance(value, ast.Constant) else None
        text = ast.unparse(value)
        ours = path if named is None else named.ours
        if path == "trainer.limit_val_batches" and isinstance(literal, int):
            ours, text = "data.val_samples", f"{text} * recipe.data.global_batch_size"
        elif path == "trainer.val_check_interval" and isinstance(literal, float):
            self.out.say(node, "trainer.val_check_interval is a whole number of steps; set it")
            return
        elif path == "resume.resume_if_exists":
            text = repr("auto" if literal is not False else "never")
        elif path == "resume.restore_config.path" and isinstance(literal, str):
            text = repr(self._weights(literal))
        elif path in ("log.tensorboard", "log.wandb", "data.packed_sequence_specs"):
            text = str(bool(literal) or not isinstance(value, ast.Constant))
        elif path == "data.dataset_root" and self._is_plain(value, scope.known):
            for field_, file in (("paths", "training"), ("val_paths", "validation")):
                self._set(
                    scope,
                    f"data.{field_}",
                    f'f"{{{text}}}/{file}.jsonl"' if literal is None else repr(f"{literal}/{file}.jsonl"),
                )
            self.out.say(node, "data.paths and data.val_paths; docs/finetune.md lists the names of their fields")
            return
        elif path == "peft" and literal is None and text == "None":
            ours = "model.lora"
        elif named is not None and not named.same:
            self.out.say(node, str(named))
            return
        if ours.startswith("trainer.strategy.") and text == "None":
            text = "1"
        if not ours:
            self.out.say(node, str(named))
        elif not self._is_plain(value, scope.known):
            self.out.say(node, f"not migrated: the recipe does not know {text}; set {ours}")
        elif scope.sample is not None and (why := self._missing(scope.sample, ours)):
            self.out.say(node, f"not migrated: {answer(names_at(path)) or why}")
        else:
            self._set(scope, ours, text)
            self.out.say(node, f"recipe.{ours}{'' if named is None or not named.note else f': {named.note}'}")

    def _special(self, scope: _Scope, node: ast.AST, path: str, call: ast.Call) -> str | None:
        """A field that is a part with fields of its own, or a preset; None if it is a plain value."""
        called = ast.unparse(call.func).split(".")[-1]
        first = call.args[0] if called in CONFIGS and call.args else None
        kind = called if first is None else ast.unparse(first).split(".")[-1]
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        if path == "peft":
            names = {"dim": "rank", "alpha": "alpha", "dropout": "dropout", "target_modules": "target_modules"}
            taken = [f"{names[key]}={ast.unparse(value)}" for key, value in given.items() if key in names]
            scope.imports |= {"import fiddle as fdl", "from fiddlehead.models import LoRA"}
            dora = ["dora=True"] if "dora" in kind.lower() else []
            self._set(scope, "model.lora", f"fdl.Config({', '.join(['LoRA', *taken, *dora])})")
            left = sorted(set(given) - set(names))
            return "recipe.model.lora" + (f"; without {', '.join(left)}" if left else "")
        if path == "trainer.plugins":
            kind += getattr(given.get("precision"), "value", "") + ("mixed" if "Mixed" in kind else "")
            if "bf16" not in kind:
                return "not migrated: trainer.precision is 'bf16-mixed', 'bf16-true' or '32-true'"
            self._set(scope, "trainer.precision", repr("bf16-mixed" if "mixed" in kind else "bf16-true"))
            return "recipe.trainer.precision" + ("; model.fp8 turns float8 on" if "fp8" in kind else "")
        if path.startswith("trainer.callbacks"):
            return f"not migrated: {kind}; a callback of Lightning's or of your own is fdl.Config(...) in a list there"
        if path in ("log.tensorboard", "log.wandb"):
            self._set(scope, path, "True")
            return f"recipe.{path}"
        if path == "data.packed_sequence_specs":
            self._set(scope, "data.packed", "True")
            return "recipe.data.packed"
        parts = ("data", "optim", "log", "resume", "trainer", "model")
        if path.split(".")[0] not in parts or (first is None and not given):
            return None
        for key, value in given.items():
            self._edit(scope, value, f"{path}.{key}", value)
        if path == "data":
            return DATA.get(kind, DOWNLOADED) or "its fields, in lines of their own"
        return f"the fields of {kind}, in lines of their own"

    def _set(self, scope: _Scope, path: str, text: str) -> None:
        line = f"recipe.{path} = {text}"
        if match := re.fullmatch(r"optim\.betas\[([01])\]", path):
            pair = (text, "recipe.optim.betas[1]") if match[1] == "0" else ("recipe.optim.betas[0]", text)
            line = f"recipe.optim.betas = ({', '.join(pair)})"
        scope.body.append(line)
        scope.edited = True

    @staticmethod
    def _missing(sample: Recipe, path: str) -> str:
        try:
            find_slot(sample, path)
        except ConfigError as error:
            return str(error)
        return ""

    def _weights(self, source: str) -> str:
        """The folder of weights that stand at `nemo://` or `hf://`; what makes it is a step."""
        name = source.rpartition("://")[2].rstrip("/")
        if "://" in source:
            folder = name.rpartition("/")[2]
            self._step(f"fiddlehead import hf {name} --out {folder}")
            return folder
        return source

    def _step(self, command: str) -> None:
        if command not in self.out.steps:
            self.out.steps.append(command)

    # -- executors and starts

    def _setting(self, scope: _Scope, node: ast.AST, variable: str, name: str, value: ast.expr) -> None:
        kind, settings = scope.executors[variable]
        text = ast.unparse(value)
        if name == "tunnel" and isinstance(value, ast.Call):
            if "SSH" in ast.unparse(value.func):
                for keyword in value.keywords:
                    ours = {"job_dir": "remote_dir"}.get(keyword.arg or "", keyword.arg or "")
                    self._setting(scope, node, variable, ours, keyword.value)
            return
        if match := re.fullmatch(r"env_vars\[(.+)\]", name):
            before = settings.get("env_vars", "{}")
            settings["env_vars"] = f"{{**{before}, {match[1]}: {text}}}"
            self.out.say(node, "env_vars of the executor")
            return
        ours = SETTINGS.get(name, name)
        if kind == "DockerExecutor" and name == "container_image":
            ours = "image"
        names = [each.name for each in fields(EXECUTORS[kind])]
        if (name == "launcher" and kind != "SlurmExecutor") or ours not in names:
            said = (
                answer(names_at(f"executor.{name}"))
                or NAMED.get(f"executor.{name}")
                or Problem.unknown("", name, f"setting of {kind}", names)
            )
            self.out.say(value, f"{name}: {said}")
        elif not self._is_plain(value, scope.known):
            self.out.say(value, f"{name}: the launch file does not know {text}; set executor.{ours}")
        else:
            settings[ours] = text
            if isinstance(node, ast.Assign):
                self.out.say(node, f"{ours} of the executor")

    def _call(self, scope: _Scope, node: ast.expr) -> None:
        """A statement that is a call: it starts something, or adds to something."""
        if not isinstance(node, ast.Call):
            return
        called = ast.unparse(node.func)
        last = called.split(".")[-1]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in ("run.run", "exp.add", "experiment.add") or (last == "add" and "executor" in given):
            first = node.args[0] if node.args else ast.Name(scope.variable)
            what = ast.unparse(first.func if isinstance(first, ast.Call) else first)
            self.started[scope.name if what == scope.variable else what] = self._executor(scope, given.get("executor"))
            self.out.say(node, "a command; see below")
        elif last == "import_ckpt":
            self._import(node)
        elif last == "Experiment":
            self.out.say(node, "left out: the folder of a run is its record")
        elif last in ("run", "dryrun", "parse_args") or last in self.recipes:
            self.out.say(node, "left out: the command starts it")
        elif scope.variable and called.startswith(f"{scope.variable}."):
            path = called.removeprefix(f"{scope.variable}.")
            self._edit(
                scope, node, path.removesuffix(".append").removesuffix(".extend"), node.args[0] if node.args else node
            )
        else:
            self.out.say(node, "left out")

    def _import(self, call: ast.Call) -> None:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        source = getattr(given.get("source"), "value", None)
        if isinstance(source, str):
            self.imported.append(self._weights(source))
        self.out.say(
            call, "a command; see below" if isinstance(source, str) else "fiddlehead import hf SOURCE --out DIR"
        )

    def _executor(self, scope: _Scope, given: ast.expr | None) -> str:
        """The words of a command that name the executor."""
        if isinstance(given, ast.Call) and ast.unparse(given.func).split(".")[-1] in EXECUTORS:
            variable = "executor" if "executor" not in scope.executors else f"executor_{given.lineno}"
            self._made(scope, given, variable)
            given = ast.Name(variable)
        if isinstance(given, ast.Name) and given.id in scope.executors:
            return f"executor={scope.names[given.id]}"
        call = scope.aliases.get(given.id) if isinstance(given, ast.Name) else given
        if not isinstance(call, ast.Call) or (name := ast.unparse(call.func)) not in self.executors:
            return ""
        pairs = [
            *zip(self.parameters[name], call.args, strict=False),
            *((each.arg, each.value) for each in call.keywords),
        ]
        given_here = [(key, each.value) for key, each in pairs if isinstance(each, ast.Constant)]
        words = [f"executor.{key}={shlex.quote(str(value))}" for key, value in given_here]
        return " ".join([f"executor={name}", *words])

    # -- the files

    def _executor_text(self, scope: _Scope, name: str, kind: str, settings: Mapping[str, str]) -> str:
        function = kind.removesuffix("Executor").lower()
        used = " ".join(settings.values())
        kept = [line for line in scope.kept if re.search(rf"\b{re.escape(line.split(' = ')[0])}\b", used)]
        call = ", ".join(f"{key}={value}" for key, value in settings.items())
        lines = "".join(f"    {line}\n" for each in kept for line in each.split("\n"))
        return f"def {name}({scope.parameters}) -> {kind}:\n{lines}    return {function}({call})\n"

    def _write(self) -> None:
        for scope in self.recipes.values():
            tunes = scope.sample is not None and scope.sample.__fn_or_cls__.__name__ == "finetune"
            if tunes and len(self.imported) == 1 and not any("model.init_from =" in line for line in scope.body):
                scope.body.append(
                    f"recipe.model.init_from = {self.imported[0]!r}"
                )  # which NeMo's recipes name themselves
        constants = "".join(f"{line}\n" for line in self.constants)
        used = {"from fiddlehead.recipe import Recipe", *(x for s in self.recipes.values() for x in s.imports)}
        imports = [line for line in ("import fiddle as fdl", "") if used & {"import fiddle as fdl"}]
        imports += sorted(used - {"import fiddle as fdl"})
        head = (
            '"""Migrated from a NeMo 2.0 script by `fiddlehead migrate`."""\n\nfrom __future__ import annotations\n\n'
        )
        functions = []
        for name, scope in self.recipes.items():
            body = "".join(f"    {line}\n" for each in scope.body for line in each.split("\n"))
            functions.append(f"def {name}({scope.parameters}) -> Recipe:\n{body}    return recipe\n")
        middle = f"\n{constants}" if constants else ""
        self.out.recipe = head + "\n".join(imports) + "\n" + "\n\n".join([middle, *functions])
        kinds = sorted({kind for kind in EXECUTORS if any(f"-> {kind}:" in text for text in self.executors.values())})
        if kinds:
            froms = [f"from fiddlehead.launch.{k[:-8].lower()} import {k}, {k[:-8].lower()}" for k in kinds]
            self.out.launch = head + "\n".join(froms) + "\n" + "\n\n".join([middle, *self.executors.values()])
        found = {name if name in self.recipes else self.relayed.get(name, ""): e for name, e in self.started.items()}
        started = {name: words for name, words in found.items() if name in self.recipes}
        for name, words in (started or {list(self.recipes)[-1]: ""}).items():
            scope = self.recipes[name]
            lines = "\n".join(scope.body)
            task = "pretrain" if scope.sample is None else scope.sample.__fn_or_cls__.__name__
            has_data = "recipe.data.paths =" in lines or getattr(scope.sample and scope.sample.data, "corpus", None)
            data = "" if has_data else f" data.paths={'TOKENS' if task == 'pretrain' else 'EXAMPLES'}"
            weights = "" if task == "pretrain" or "recipe.model.init_from =" in lines else " model.init_from=WEIGHTS"
            self._step(f"fiddlehead {task} -f {name}{data}{weights}{words and ' '}{words}")

    @staticmethod
    def _is_plain(node: ast.expr, known: set[str]) -> bool:
        """Whether an expression has only literals, operators, and names and functions that the file has too."""
        return all(
            each.id in known
            if isinstance(each, ast.Name)
            else not isinstance(each, (ast.Attribute, ast.Lambda, ast.Await))
            for each in ast.walk(node)
        )


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
