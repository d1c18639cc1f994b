"""Writes the table of docs/nemo.md from the names that errors use: `python docs/nemo_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

from fiddlehead.recipe.nemo_names import rows

PAGE = Path(__file__).with_name("nemo.md")


def table() -> str:
    """All names of NeMo's that are others here, in Markdown."""
    made = [f"| `{nemo}` | {f'`{ours}`' if ours else '-'} | {note} |" for nemo, ours, note in rows()]
    return "\n".join(["| NeMo 2.0, NeMo-Run | here | |", "|---|---|---|", *made])


def filled(page: str) -> str:
    """The page with its table as it is now, between `<!-- table names -->` and `<!-- end names -->`."""
    place = re.compile(r"(<!-- table names -->\n).*?(<!-- end names -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
