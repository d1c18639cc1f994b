"""`fiddlehead help` and `fiddlehead schema`: every field of a recipe or an executor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import typer

from fiddlehead.cli.common import add_row, show, table
from fiddlehead.cli.completion import complete_field
from fiddlehead.errors import ConfigError

if TYPE_CHECKING:
    from fiddlehead.recipe.fields import Field

HELP = """Explain a field of a recipe or of an executor, or a command.

It says the field's type, its default, what it means, which values it takes, and whether it may change when a run \
goes on. A path without its beginning is enough: lr is optim.lr.

Example:  fiddlehead help model.compile

Example:  fiddlehead help executor.time
"""


def help_(
    context: typer.Context,
    names: list[str] = typer.Argument(
        None, metavar="[FIELD]", show_default=False, help="A field's path, or a command.", autocompletion=complete_field
    ),
) -> None:
    """Explain a field of a recipe or of an executor, or a command."""
    command, parent = context.find_root().command, context.find_root()
    while names and (found := getattr(command, "commands", {}).get(names[0])):
        parent = command.context_class(found, parent=parent, info_name=names[0], **found.context_settings)
        command, names = found, names[1:]
    if not names:
        print(command.get_help(parent))  # noqa: T201
        return
    from fiddlehead.recipe.fields import known_fields

    fields = known_fields()
    path = names[0].removeprefix("run.").partition("=")[0]
    matches = [each for each in fields if each.path == path] or _only([e for e in fields if _ends(e.path, path)])
    if not matches:
        raise _unknown(path, fields, sorted(getattr(context.find_root().command, "commands", {})))
    for each in matches:
        _show(each)
    below = [each for each in fields if each.path.startswith(f"{matches[0].path}.")]
    if below:
        _show_below(matches[0].path, below)


def schema(
    as_reference: bool = typer.Option(False, "--reference", help="Print the reference page, docs/reference.md."),
) -> None:
    """Print the JSON Schema of a recipe's YAML, by which an editor completes and checks it.

    Example:  fiddlehead schema > recipe.schema.json
    """
    if as_reference:
        from fiddlehead.recipe.fields import known_fields
        from fiddlehead.recipe.reference import reference

        print(reference(known_fields()), end="")  # noqa: T201
        return
    from fiddlehead.recipe.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))  # noqa: T201


def _ends(path: str, end: str) -> bool:
    return path.endswith(f".{end}")


def _only(matches: Sequence[Field]) -> list[Field]:
    """The matches, if all have the same path; else the question is not clear, and there are none."""
    return list(matches) if len({each.path for each in matches}) == 1 else []


def _unknown(path: str, fields: Sequence[Field], commands: Sequence[str]) -> ConfigError:
    paths = list(dict.fromkeys(each.path for each in fields))
    last = path.rpartition(".")[2]
    near = [each for each in paths if _ends(each, last)]
    near = near or get_close_matches(path, [*paths, *commands], n=3, cutoff=0.7)
    if not near:
        names = get_close_matches(last, {each.rpartition(".")[2] for each in paths}, n=2, cutoff=0.7)
        near = [each for each in paths if each.rpartition(".")[2] in names]
    hint = f"did you mean {' or '.join(near[:4])}?" if near else "`fiddlehead help model` lists the fields of a part"
    return ConfigError(f"there is no field {path!r}; {hint}")


def _show(each: Field) -> None:
    made = table(each.path, f"of {each.owner}")
    add_row(made, "type", each.type)
    add_row(made, "default", each.default or "none: it must be set")
    if each.allowed:
        add_row(made, "values", ", ".join(each.allowed))
    if each.parts:
        add_row(made, "parts", ", ".join(each.parts))
    add_row(made, "on resume", "may change" if each.resumable else "must stay the same")
    if each.doc:
        add_row(made, "meaning", each.doc)
    show(made, "")


def _show_below(path: str, below: Sequence[Field]) -> None:
    made = table("field", "default", "meaning", optional=("default",))
    next_level = path.count(".") + 1
    seen: set[str] = set()
    for each in below:
        if each.path.count(".") == next_level and each.path not in seen:
            add_row(made, each.path, each.default, each.doc.partition(". ")[0])
        seen.add(each.path)
    show(made)
