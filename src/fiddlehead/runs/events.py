"""What happened in a run, from its log: attempts, resumptions, stops, warnings, errors, and samples of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

MAX_LOG = 64 * 2**20
"""The bytes at the end of a log that are searched."""
MAX_LINE = 2000
"""Characters of a line that are kept."""

_KINDS = {
    "attempt": re.compile(r"=== started "),
    "start": re.compile(r"run .*: (starts anew|continues from )"),
    "warning": re.compile(r"WARNING: |\S.*?:\d+: \w*Warning: "),
    "error": re.compile(r"error: |\w*(Error|Exception): "),
    "stop": re.compile(r"stopped |interrupted at once|failure \d+ of \d+ at step |cancelling"),
    "sample": re.compile(r"step +\d+  asked "),
}
"""How the lines of each kind begin."""


@dataclass(frozen=True)
class Event:
    """A line of the log."""

    kind: str
    """A key of the table in this module: attempt, start, warning, error, stop or sample."""
    text: str
    count: int = 1
    """How often the line came in a row."""


def read_events(log: Path) -> tuple[list[Event], bool]:
    """The events in a log, in order; and whether its beginning was left out, because it is larger than `MAX_LOG`."""
    found: list[Event] = []
    if not log.is_file():
        return found, False
    with log.open("rb") as stream:
        beyond = stream.seek(0, 2) - MAX_LOG
        stream.seek(max(0, beyond))
        if beyond > 0:
            stream.readline()
        while lines := list(islice(iter(lambda: stream.readline(1 << 20), b""), 10_000)):
            for line in lines:
                text = line.decode(errors="replace").rstrip()[:MAX_LINE]
                kind = next((kind for kind, pattern in _KINDS.items() if pattern.match(text)), "")
                if not kind:
                    continue
                if found and (found[-1].kind, found[-1].text) == (kind, text):
                    found[-1] = Event(kind, text, found[-1].count + 1)
                else:
                    found.append(Event(kind, text))
    return found, beyond > 0
