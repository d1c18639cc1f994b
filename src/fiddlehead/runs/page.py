"""Makes one HTML file that needs no network: styles, charts and the script that zooms them are inside."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from fiddlehead.runs.charts import script_json
from fiddlehead.runs.curves import PALETTE

LONG_TITLE = 40
"""The title of a column with more characters, such as the name of a run, may be broken."""


class Html(str):
    """Text that is HTML already; every other text is escaped."""

    __slots__ = ()


def html(value: Any) -> str:
    """A value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def page(title: str, body: str, *, zooms: bool = True, refresh: int = 0) -> str:
    """A whole page.

    Its own policy lets no script run but that of the page, and nothing be loaded: what a run has recorded may come
    from anybody.

    Args:
        zooms: whether it has charts, for which the script is put in.
        refresh: after how many seconds a browser loads it anew; 0 is never.
    """
    own = script() if zooms else ""
    again = f'<meta http-equiv=refresh content="{refresh}">' if refresh else ""
    part = f"<script>{own}</script>" if own else ""
    text = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy(own)}">'
        f'<meta name=viewport content="width=device-width, initial-scale=1">{again}'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>{body}</main>{part}</body></html>\n"
    )
    return text.encode(errors="replace").decode()  # halves of surrogate pairs, which a name may have


def policy(own: str) -> str:
    """The content security policy of a page with the script `own`."""
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if own else ""
    return f"default-src 'none'; {scripts}style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> Html:
    """A table; numbers are aligned to the right. It scrolls where it is too wide; without rows it is empty.

    Args:
        kind: "list" has one line for each row.
    """
    rows = list(rows)
    numeric = [isinstance(cell, int) for cell in rows[0]] if rows else [False] * len(head)
    titles = "".join(map(_title, head, numeric))
    top = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return Html(f'<div class=wide><table class="{kind}">{top}<tbody>{lines}</tbody></table></div>' if lines else "")


@functools.cache
def script() -> str:
    """uPlot, with its license, and the script that draws the charts with it."""
    library = _read("vendor/uplot/uPlot.iife.min.js")
    license_text = _read("vendor/uplot/LICENSE")
    return f"/*! uPlot\n{license_text}\n*/\n{library}\nconst COLOURS = {script_json(PALETTE)};\n{_read('page.js')}"


@functools.cache
def _style() -> str:
    colours = "".join(
        f".line.c{number}{{stroke:{colour}}}.dot.c{number},.key.c{number}{{fill:{colour};background:{colour}}}"
        for number, colour in enumerate(PALETTE)
    )
    return f"{_read('vendor/uplot/uPlot.min.css')}\n{_read('page.css')}{colours}"


def _read(name: str) -> str:
    return files("fiddlehead.runs").joinpath(name).read_text(encoding="utf-8")


def _title(text: str, numeric: bool) -> str:
    kind = " class=n" if numeric else " class=long" if len(text) > LONG_TITLE else ""
    return f"<th scope=col{kind}>{html(text)}</th>" if text else "<td></td>"


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"<td class=n>{value:,}</td>"
    text = html(value)
    return f"<td>{text if isinstance(value, Html) else _WORD_ENDS.sub('<wbr>', text)}</td>"


_WORD_ENDS = re.compile(r"(?<=\w[._:/])(?=[A-Za-z])|(?<=_)(?=[A-Za-z])")
"""Where a long name may be broken: behind its dots, colons, slashes and underscores."""
