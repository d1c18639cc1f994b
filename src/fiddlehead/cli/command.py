"""The click command that typer makes, with plain help texts: all contact with what typer keeps private."""

from __future__ import annotations

import functools
from typing import Any

import typer


@functools.cache
def made_of(app: typer.Typer) -> Any:
    """The command of `app`. Its help names what a value is, and not its Python type; a flag takes none."""
    command: Any = typer.main.get_command(app)
    _describe(command, None)
    return command


def _describe(command: Any, parent: Any) -> None:
    context = command.context_class(command, parent=parent, info_name=command.name, **command.context_settings)
    for parameter in command.get_params(context):
        if parameter.param_type_name == "argument":
            _as_written(parameter)
        elif getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter.metavar is None:
            parameter.metavar = _value_name(parameter, context)
    for each in getattr(command, "commands", {}).values():
        _describe(each, context)


def _value_name(option: Any, context: Any) -> str:
    """N for a whole number, X for another number, TEXT for the rest."""
    kind = option.display_type(context) if hasattr(option, "display_type") else option.type.name
    return "N" if "int" in kind else "X" if "float" in kind else "TEXT"


def _as_written(argument: Any) -> None:
    """Shows an argument by its metavar alone; typer 0.29 adds brackets, dots and its type to it."""
    if argument.metavar is not None:
        argument.display_type_rich = lambda ctx: ""
        argument._rich_display_name = lambda: argument.metavar
        argument._usage_display_name = lambda: argument.metavar
