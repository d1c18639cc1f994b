"""The reference page: every field of recipes and executors, as a Markdown text."""

from __future__ import annotations

from collections.abc import Sequence

from fiddlehead.recipe.fields import EXECUTOR, Field

HEAD = """\
# Reference

Every field of recipes and executors, from the code. `fiddlehead help FIELD` says the same in a terminal, and
`fiddlehead schema` prints the JSON Schema of a recipe's YAML. This page is written by
`fiddlehead schema --reference > docs/reference.md`.

A field with *resume* may change when a run goes on from its checkpoint; a change of another one makes another run,
which needs another name. A field without a default must be set.
"""


def reference(fields: Sequence[Field]) -> str:
    """The page; a table for each class, in the order of the fields."""
    lines = [HEAD]
    tables: dict[tuple[str, str], list[Field]] = {}
    for each in fields:
        tables.setdefault((each.path.rpartition(".")[0], each.owner), []).append(each)
    for (path, owner), rows in tables.items():
        kind = "" if not path else f"`{path}`: "
        title = "Every recipe" if not path else f"{kind}the executor {owner}" if path == EXECUTOR else f"{kind}{owner}"
        lines += [f"## {title}", "", "| field | type | default | resume | meaning |", "|---|---|---|---|---|"]
        lines += [_row(each) for each in rows]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(each: Field) -> str:
    name = each.path.rpartition(".")[2]
    default = f"`{_cell(each.default)}`" if each.default else ""
    parts = f" Parts: {', '.join(each.parts)}." if each.parts else ""
    meaning = _cell(f"{each.doc}{parts}".strip())
    return f"| `{name}` | `{_cell(each.type)}` | {default} | {'resume' if each.resumable else ''} | {meaning} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
