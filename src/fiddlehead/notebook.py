"""Tables as HTML, for the values that a notebook shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Jupyter aligns the cells of a table to the right. Colours are left to the notebook, which may be dark.
STYLE = (
    "<style>table.fiddlehead :is(td, th, caption) { text-align: left; vertical-align: top; overflow-wrap: anywhere; "
    "white-space: pre-wrap } table.fiddlehead td:first-child { white-space: nowrap }</style>"
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table whose texts are escaped; it needs `STYLE` once on the page."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="fiddlehead">{above}{top}<tbody>{lines}</tbody></table>'


def section(title: str, note: str, content: str, *, is_open: bool = False) -> str:
    """A part that a reader opens and closes, without a script.

    Args:
        note: what is also read of a closed section.
        content: HTML.
    """
    summary = f"<summary><strong>{escape(title)}</strong> {escape(note)}</summary>"
    return f"<details{' open' if is_open else ''}>{summary}{content}</details>"
