"""Renders chat templates in a separate process, which runs this file and ends with the process that started it.

A template is a program that someone else wrote: Jinja's sandbox keeps it from what it must not touch, but it can still
compute for ever or fill the memory. The system ends it here, and with it nothing but this process.

Each line on the standard input is JSON: `template`, and the `variables` that it is given. The answer to each is a line:
`text`, or `error`. This file imports nothing of the package, so that the process begins quickly.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

SECONDS = 1.0
"""CPU time that one text may take."""
MEMORY = 128 << 20
"""The memory limit of the process, in bytes."""
WATCHED = "watched"
"""The argument for systems that cannot limit memory: the parent process then watches it."""
LENGTH = 1 << 24
"""Characters that one text may have."""


@lru_cache(maxsize=8)
def compiled(text: str) -> Any:
    """The template, as transformers compiles it; that takes far longer than to render it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers for transformers' own masks; what is inside is text as any other."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a set of the instance's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def now(format: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment.from_string(text)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The text that a request asks for, or why there is none."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, whatever that computes
    try:
        text = compiled(request["template"]).render(request["variables"])
    except MemoryError:
        return {"error": f"needs more than {MEMORY >> 20} MB"}
    except RecursionError:
        return {"error": "calls itself without end, or is nested too deep"}
    except Exception as error:  # whatever it computes
        return {"error": " ".join((str(error) or type(error).__name__).split())[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"text": text} if len(text) <= LENGTH else {"error": f"writes more than {LENGTH:,} characters"}


def main() -> None:
    """Answers until the input ends."""
    compiled("{{ 1 }}")  # what is imported for it does not count
    if sys.argv[1:] != [WATCHED]:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it
    for line in sys.stdin:
        try:
            written = json.dumps(answer(json.loads(line)))
        except MemoryError:
            written = json.dumps({"error": f"needs more than {MEMORY >> 20} MB"})
        sys.stdout.write(written + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
