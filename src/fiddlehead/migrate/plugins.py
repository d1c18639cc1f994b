"""NeMo's plugins of a job, as lines of the recipe and of the executor."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fiddlehead.migrate.scope import MadeExecutor, Scope, last_name, made_by

PLUGINS = {
    "PreemptionPlugin": "leave it out: a run saves its step before it is stopped (executor.save_before)",
    "FaultTolerancePlugin": "leave it out: a run that fails or is killed is queued again",
    "NsysPlugin": "log.nsys='10:12' profiles these steps",
    "PytorchProfilerPlugin": "log.profile='10:12' profiles these steps",
    "MemoryProfilePlugin": "log.profile='10:12' profiles these steps, with each allocation",
    "WandbPlugin": "log.wandb=True",
    "ConfigValidationPlugin": "leave it out: every run is checked",
    "PerfEnvPlugin": "leave it out: its variables are Transformer Engine's and Megatron's",
}
"""What there is for NeMo's plugins where nothing can be written."""
_UNKNOWN = "they change the recipe and the executor: write that in their functions"


def note_plugins(scope: Scope, variable: str, value: ast.expr) -> bool:
    """Notes the plugins that a variable of the script holds; False if it holds none."""
    found = [each for each in _parts(scope, value) if _name(each).endswith("Plugin")]
    if found:
        scope.plugins.setdefault(variable, []).extend(found)
    return bool(found)


def take_plugins(scope: Scope, recipe: Scope | None, executor: MadeExecutor | None, given: ast.expr) -> None:
    """Writes what the plugins of a task mean, and says what has become of each.

    Args:
        scope: where the task is added.
        recipe: the scope of the task's recipe; None if it is not known.
        executor: the task's executor, if its lines are not written yet.
    """
    found = list(_parts(scope, given))
    known = [each for each in found if _name(each) in PLUGINS]
    for each in known:
        name = _name(each)
        arguments = made_by(each)[1].keywords if isinstance(each, ast.Call) else []
        values = {str(keyword.arg): keyword.value for keyword in arguments}
        done = (recipe is not None and _in_recipe(recipe, name, values)) or (
            executor is not None and executor.kind == "SlurmExecutor" and _in_executor(executor, name, values)
        )
        scope.out.say(each, done or f"{name}: {PLUGINS[name]}")
    if len(known) < len(found) or not found:
        scope.out.say(given, f"plugins: not migrated; {_UNKNOWN}")


def _in_recipe(recipe: Scope, name: str, values: dict[str, ast.expr]) -> str:
    """Writes a plugin as lines of the recipe; returns what it has become, "" if it is not one of the recipe."""
    field = {"NsysPlugin": "nsys", "PytorchProfilerPlugin": "profile"}.get(name)
    first, last = (_literal(values.get(key)) for key in ("start_step", "end_step"))
    if field and isinstance(first, int) and isinstance(last, int):
        recipe.put(f"log.{field}", repr(f"{first + 1}:{last + 1}"))
        return f"recipe.log.{field}: steps are counted from 1 here"
    if name == "WandbPlugin":
        recipe.put("log.wandb", "True")
        logger = values.get("logger_fn")
        for keyword in logger.keywords if isinstance(logger, ast.Call) else ():
            if keyword.arg in ("project", "entity", "group", "notes") and recipe.is_plain(keyword.value):
                recipe.put(f"log.wandb_{keyword.arg}", ast.unparse(keyword.value))
        return "recipe.log.wandb; the run is called log.name there too"
    return ""


def _in_executor(executor: MadeExecutor, name: str, values: dict[str, ast.expr]) -> str:
    """Writes a plugin as a line of the executor; returns what it has become, "" if it is not one of the executor."""
    if name == "PreemptionPlugin":
        seconds = _literal(values.get("preempt_time")) or 60
        executor.lines.append(f"executor.signal = 'USR1@{seconds}'")
        return "executor.signal, in the launch file"
    if name == "FaultTolerancePlugin":
        executor.lines.append(f"executor.retries = {_literal(values.get('num_job_retries_on_failure')) or 2}")
        return "executor.retries, in the launch file: a run that fails is queued again"
    return ""


def _parts(scope: Scope, value: ast.expr) -> Iterator[ast.expr]:
    """The plugins of a list, of a variable, or of lists that are added."""
    if isinstance(value, (ast.List, ast.Tuple)):
        for each in value.elts:
            yield from _parts(scope, each)
    elif isinstance(value, ast.BinOp):
        yield from _parts(scope, value.left)
        yield from _parts(scope, value.right)
    elif isinstance(value, ast.Name) and value.id in scope.plugins:
        yield from scope.plugins[value.id]
    else:
        yield value


def _name(plugin: ast.expr) -> str:
    return made_by(plugin)[0] if isinstance(plugin, ast.Call) else last_name(plugin)


def _literal(value: ast.expr | None) -> object:
    return value.value if isinstance(value, ast.Constant) else None
