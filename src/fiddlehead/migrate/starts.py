"""What starts a job in a script, as commands."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator

EXPERIMENT = "left out: the commands start the runs; NeMo-Run's experiments also take recipes as they are"
PLUGINS = {
    "PreemptionPlugin": "leave it out: a run saves its step before it is stopped (executor.save_before)",
    "FaultTolerancePlugin": "leave it out: a run that fails or is killed is queued again",
    "NsysPlugin": "log.profile='10:12' profiles these steps",
    "PytorchProfilerPlugin": "log.profile='10:12' profiles these steps",
    "MemoryProfilePlugin": "log.profile='10:12' profiles these steps",
    "WandbPlugin": "log.wandb=True",
    "ConfigValidationPlugin": "leave it out: every run is checked",
    "PerfEnvPlugin": "set executor.env_vars",
}
"""What is there for NeMo's plugins of a job."""


def said_of_plugins(given: ast.expr) -> Iterator[tuple[ast.AST, str]]:
    """What to do about the plugins of a task: the nodes, and the words for each."""
    found = [each for each in ast.walk(given) if isinstance(each, (ast.Call, ast.Attribute, ast.Name))]
    named = {ast.unparse(each).split("(")[0].split(".")[-1]: each for each in reversed(found)}
    known = [name for name in named if name in PLUGINS]
    for name in known:
        yield named[name], f"{name}: {PLUGINS[name]}"
    if not known:
        yield given, "plugins: not migrated; they change the recipe and the executor: write that in their functions"


def words_of_call(call: ast.Call, parameters: list[str]) -> str:
    """The words of a command for the literal arguments of an executor's function."""
    pairs = [
        *zip(parameters, call.args, strict=False),
        *((each.arg, each.value) for each in call.keywords),
    ]
    literal = [(key, each.value) for key, each in pairs if isinstance(each, ast.Constant)]
    return " ".join(f"executor.{key}={shlex.quote(str(value))}" for key, value in literal)
