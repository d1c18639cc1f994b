"""Tables that fit the terminal: a cell wraps between its words, and a name stays whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

GAP = "   "
"""What is between two columns."""
LONG_PATH = 40
"""A path with more characters may be broken behind a slash."""
NARROWEST = 8
"""The least width of a first column whose long names have lines of their own."""
_BOLD = Style(bold=True)
_FOLDERS = re.compile(r"[^\s/]*/+|[^\s/]+")


class FittedTable(Table):
    """A table that breaks no word, however narrow the terminal is.

    Where its cells would become narrow, the optional columns are left out, one after the other. If the longest words
    still do not fit side by side, a name in the first column has a line of its own, with the rest of its row below.

    Args:
        columns: their headers.
        optional: those that may be left out, the first of them first.
        notes: the last column has remarks: where they would need three lines or more, each stands below its row.
    """

    def __init__(self, *columns: str, optional: Sequence[str] = (), notes: bool = False) -> None:
        super().__init__()
        self.optional = tuple(optional)
        self.notes = notes
        for column in columns:
            self.add_column(column)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        columns = [[_text(column.header), *map(_text, column.cells)] for column in self.columns]
        justify = [column.justify for column in self.columns]
        below = [Text()] * len(columns[0])
        if self.notes and _needs_lines(columns[-1], _widths(columns, width)[-1]):
            below, justify = columns.pop(), justify[:-1]
        for name in self.optional:
            if _is_crowded(columns, width):
                index = next(index for index, cells in enumerate(columns) if cells[0].plain == name)
                del columns[index], justify[index]
        widths = _widths(columns, width)
        header, *rows = zip(*columns, strict=True)
        if any(cell.plain for cell in header):
            for cell in header:
                cell.stylize(_BOLD)
            yield from _lines(console, header, widths, justify)
            yield Text("─" * min(width, sum(widths) + len(GAP) * (len(widths) - 1)))
        for row, note in zip(rows, below[1:], strict=True):
            yield from _lines(console, row, widths, justify)
            if note.plain:
                yield from _hanging(console, Text("  ") + note, width)


def _text(cell: object) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(str(cell))


def _words(text: str) -> list[str]:
    """What may stand alone on a line: the words, and of a long path each folder."""
    words = text.split()
    return [part for word in words for part in (_FOLDERS.findall(word) if len(word) > LONG_PATH else [word])]


def _longest_word(cells: Sequence[Text]) -> int:
    return max((Text(word).cell_len for cell in cells for word in _words(cell.plain)), default=0)


def _longest_line(cells: Sequence[Text]) -> int:
    return max((Text(line).cell_len for cell in cells for line in cell.plain.split("\n")), default=0)


def _needs_lines(cells: Sequence[Text], size: int) -> bool:
    """Whether a cell of a column would need three lines or more."""
    return 2 * size < _longest_line(cells)


def _is_crowded(columns: Sequence[Sequence[Text]], width: int) -> bool:
    """Whether a cell would need three lines or more, or a name a line of its own that has room on a line."""
    widths = _widths(columns, width)
    names = [cell for cell in columns[0] if _longest_word([cell]) <= width]
    return _longest_word(names) > widths[0] or any(
        _needs_lines(cells, size) for cells, size in zip((names, *columns[1:]), widths, strict=True)
    )


def _widths(columns: Sequence[Sequence[Text]], width: int) -> list[int]:
    """The width of each column: the widest gives way first, and none becomes narrower than its longest word.

    Where that is impossible, the first column is as narrow as the others need it, and no wider than the names that fit
    into it; or words are broken in the widest.
    """
    widths, least = list(map(_longest_line, columns)), list(map(_longest_word, columns))
    room = width - len(GAP) * (len(columns) - 1)
    rest = room - sum(least[1:])
    if NARROWEST <= rest < least[0]:
        fitting = [cell for cell in columns[0] if _longest_word([cell]) <= rest]
        widths[0] = least[0] = min(rest, max(NARROWEST, _longest_line(fitting)))
    while sum(widths) > room:
        free = [index for index, size in enumerate(widths) if size > least[index]]
        free = free or [index for index, size in enumerate(widths) if size > len(GAP)]
        if not free:
            break
        widths[max(free, key=lambda index: widths[index])] -= 1
    return widths


def _lines(console: Console, row: Sequence[Text], widths: Sequence[int], justify: Sequence[str]) -> list[Text]:
    """The lines of a row."""
    name, alone = row[0], []
    if len(row) > 1 and NARROWEST <= widths[0] < _longest_word([name]):
        alone, name = list(_wrapped(console, name, console.width)), Text()
    cells = [_wrapped(console, cell, size) for cell, size in zip((name, *row[1:]), widths, strict=True)]
    if alone and not any(line.plain for cell in cells for line in cell):
        return alone
    made = []
    for number in range(max(map(len, cells))):
        line = Text()
        for cell, size, side in zip(cells, widths, justify, strict=True):
            part = cell[number].copy() if number < len(cell) else Text()
            (part.pad_left if side == "right" else part.pad_right)(max(0, size - part.cell_len))
            line.append_text(part)
            line.append(GAP)
        line.rstrip()
        made.append(line)
    return [*alone, *made]


def _wrapped(console: Console, text: Text, width: int) -> list[Text]:
    """The text in lines of at most `width`, broken between words, or in a path behind a slash."""
    ends, column = [], 0
    for word in re.finditer(r"\S+|\s", text.plain):
        column = 0 if word[0].isspace() else column
        for part in _FOLDERS.finditer(word[0]) if len(word[0]) > LONG_PATH else ():
            size = Text(part[0]).cell_len
            if column and column + size > width:
                ends.append(word.start() + part.start())
                column = 0
            column += size
    pieces = text.divide(ends)
    return [line for piece in pieces for line in _hanging(console, piece, width)] or [Text()]


def _hanging(console: Console, text: Text, width: int) -> list[Text]:
    """The lines of a text; where it is indented, those after the first are indented by two more."""
    lines = list(text.wrap(console, width, overflow="fold"))
    indent = len(text.plain) - len(text.plain.lstrip())
    if not indent or len(lines) == 1 or width < 4 * indent:
        return lines
    rest = text[len(lines[0].plain) :]
    rest = rest[len(rest.plain) - len(rest.plain.lstrip()) :]
    more = list(rest.wrap(console, width - indent - 2, overflow="fold"))
    for line in more:
        line.pad_left(indent + 2)
    return [lines[0], *more]
