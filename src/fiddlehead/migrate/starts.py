"""What starts a job in a script, as commands."""

from __future__ import annotations

import ast
import shlex

EXPERIMENT = "left out: the commands start the runs; NeMo-Run's experiments also take recipes as they are"


def words_of_call(call: ast.Call, parameters: list[str]) -> str:
    """The words of a command for the literal arguments of an executor's function."""
    pairs = [
        *zip(parameters, call.args, strict=False),
        *((each.arg, each.value) for each in call.keywords),
    ]
    literal = [(key, each.value) for key, each in pairs if isinstance(each, ast.Constant)]
    return " ".join(f"executor.{key}={shlex.quote(str(value))}" for key, value in literal)
