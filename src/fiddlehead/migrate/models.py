"""The first line of a recipe, for what makes one in a script: a recipe of NeMo's, or a call of a task."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.migrate.fields import edit
from fiddlehead.migrate.parts import model_of, resolved
from fiddlehead.migrate.scope import CONFIGS, TASKS, Scope, last_name
from fiddlehead.recipe import catalog

RENAMED = {
    "phi3_mini_4k_instruct": "phi3_mini",
    "mistral_nemo_base_12b": "mistral_nemo_12b",
    "mixtral_8x7b_16k": "mixtral_8x7b",
    "phi3_mini_config": "phi3_mini",
}
"""NeMo's recipes that have another name here."""
SIZES = {"num_nodes": "trainer.num_nodes", "num_gpus_per_node": "trainer.devices"}
_WITHOUT = {
    "performance_mode": "recipes are laid out for speed as they are",
    "resume_path": "set model.init_from to a folder that `fiddlehead import hf` makes",
    "fn": "the command names the task",
}
"""What there is for arguments of NeMo's recipes that ours do not have."""
ORDER = ("model", "trainer", "data", "log", "optim", "resume", "peft", "tokenizer")
"""The arguments of NeMo's tasks, in the order in which they are written."""


def task_of(call: ast.Call) -> str:
    """The task of ``llm.pretrain(model=...)`` or ``run.Partial(llm.pretrain, model=...)``; "" for another call."""
    given = {each.arg for each in call.keywords}
    is_config = last_name(call.func) in CONFIGS and bool(call.args)
    called = call.args[0] if is_config else call.func
    name = last_name(called)
    is_known = isinstance(called, ast.Attribute) or (isinstance(called, ast.Name) and name in TASKS)
    return TASKS.get(name, "") if is_known and given & {"model", "trainer"} else ""


def begin_recipe(scope: Scope, call: ast.Call, variable: str, model: str, kind: str) -> None:
    """The first line of a recipe that a function of NeMo's makes.

    Raises:
        ConfigError: there is no such model here.
    """
    ours, module, function = _begin(scope, call, variable, model, kind)
    known, taken = inspect.signature(function).parameters, []
    for keyword in call.keywords:
        value = scope.reads(keyword.value)
        if keyword.arg in SIZES:
            scope.note(SIZES[keyword.arg], ast.unparse(value))
            if isinstance(value, ast.Name):
                scope.sizes[value.id] = SIZES[keyword.arg]
        if keyword.arg not in known:
            scope.out.say(keyword, f"left out: {_WITHOUT.get(str(keyword.arg), f'{ours}.{kind} does not have it')}")
        elif keyword.arg and scope.is_plain(value):
            taken.append(f"{keyword.arg}={ast.unparse(value)}")
        else:
            scope.out.say(keyword, "set it yourself; the recipe does not know its value")
    taken = [ast.unparse(each) for each in call.args if scope.is_plain(each)] + taken
    scope.body += [*scope.kept, f"recipe = {ours}.{kind}({', '.join(taken)})"]
    scope.out.say(call, f"{ours}.{kind} of {module}")


def begin_task(
    scope: Scope, call: ast.Call, variable: str, task: str, classes: Mapping[str, tuple[str, list[ast.keyword]]]
) -> None:
    """The lines of a recipe for a task that is given its model, its trainer and its other parts.

    Args:
        classes: the script's own configurations of models.

    Raises:
        ConfigError: there is no such model here, or none is named.
    """
    given = {str(each.arg): resolved(scope, each.value) for each in call.keywords}
    model, fields = model_of(given.pop("model", ast.Constant(None)), classes)
    if not model:
        why = "its model is not named; set model=llm.LlamaModel(llm.Llama3Config8B()), or another one"
        raise ConfigError(Problem.in_file(f"line {call.lineno}", why))
    ours, module, _ = _begin(scope, call, variable, model, f"{task}_recipe")
    scope.body += [*scope.kept, f"recipe = {ours}.{task}_recipe({'peft_scheme=None' * (task == 'finetune')})"]
    scope.out.say(call, f"{ours}.{task}_recipe of {module}")
    for each in fields:
        edit(scope, each, f"model.config.{each.arg}", scope.reads(each.value))
    for name in sorted(given, key=lambda each: ORDER.index(each) if each in ORDER else len(ORDER)):
        if name == "tokenizer" and isinstance(given[name], ast.Constant):
            continue  # "data" or "model": theirs is used here too
        node = next(each for each in call.keywords if each.arg == name)
        edit(scope, node, {"tokenizer": "data.tokenizer"}.get(name, name), given[name])


def _begin(scope: Scope, call: ast.Call, variable: str, model: str, kind: str) -> tuple[str, str, Callable]:
    """Our name of a model, its module, and the function that makes its recipe."""
    ours = RENAMED.get(model, model)
    entry = next((each for each in catalog.recipes() if each.name == ours), None)
    if entry is None:
        names = [each.name for each in catalog.recipes() if hasattr(each.load(), kind)]
        raise ConfigError(Problem.in_file(f"line {call.lineno}", Problem.unknown("", model, "model", names)))
    function = getattr(entry.load(), kind, None)
    if function is None:
        raise ConfigError(Problem.in_file(f"line {call.lineno}", f"{ours} has no {kind}"))
    scope.variable, scope.sample, scope.edited, scope.relayed = variable, function(), True, None
    scope.imports.add(f"from {entry.module} import {ours}")
    return ours, entry.module, function
