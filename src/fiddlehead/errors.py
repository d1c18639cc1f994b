"""Errors that are written for the person who typed the command."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from fiddlehead.numbers import plain

_LONGEST = 2000
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""`OSError.errno` where there is no room left."""
_OF_THE_MACHINE = (
    *FULL_DISK,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
)


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()
"""The value of `Problem.given` if no value was given, or if it is not worth repeating."""


def kind_in_json(value: Any) -> str:
    """What a value of a JSON file is, in JSON's words: "a number", "null" and so on."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: str(value).lower(), type(None): "null"}
    return kinds.get(type(value), "a number")


class Problem(str):
    """One thing that is wrong with a user's input; as text, it is the line that the user reads.

    `Problem("num_query_groups", 3, "does not divide num_attention_heads=8", (1, 2, 4, 8))` reads
    ``num_query_groups=3: does not divide num_attention_heads=8; allowed: 1, 2, 4, 8``.

    Args:
        path: the path of the field in the recipe, or the name of an argument; "" if it is about no single field.
        given: its value; the text shows it only if there is a path.
        message: what is wrong with it.
        allowed: the allowed values. If one of these names is close to `given`, the text offers only that one.
    """

    __slots__ = ("allowed", "given", "message", "path")

    def __new__(
        cls, path: str, given: object = UNSET, message: str = "", allowed: Iterable[object] | None = None
    ) -> Problem:
        names = None if allowed is None else tuple(allowed)
        head = f"{path}={_shown(given)}" if path and given is not UNSET else path
        text = message if names is None else "; ".join(filter(None, (message, _choice(given, names))))
        self = super().__new__(cls, _shortened(f"{head}: {text}" if head else text))
        self.path, self.given, self.message, self.allowed = path, given, message, names
        return self

    def __getnewargs__(self) -> tuple[object, ...]:  # type: ignore[override]
        return self.path, self.given, self.message, self.allowed

    @classmethod
    def unknown(cls, path: str, given: object, what: str, allowed: Iterable[str]) -> Problem:
        """The problem of a name that is not in `allowed`; `what` is the kind of thing it should name."""
        return cls(path, given, f"unknown {what} {given!r}", allowed)

    @classmethod
    def in_file(cls, place: object, message: str) -> Problem:
        """A problem in a file; `place` is its path, with a line if there is one."""
        return cls("", UNSET, f"{place}: {message}")

    def under(self, path: str) -> Problem:
        """The same problem, with `path` in front of its own path."""
        if not path or not self.path:
            return self
        return Problem(f"{path}.{self.path}", self.given, self.message, self.allowed)


class ConfigError(ValueError):
    """A user's request cannot be done; the command prints the error without a traceback and exits with 2.

    Args:
        problems: all problems. A text that is not a `Problem` is about no single field.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(each if isinstance(each, Problem) else Problem("", message=each) for each in problems)
        super().__init__("\n".join(self.problems))

    def under(self, path: str) -> ConfigError:
        """The same problems, with `path` in front of their own paths."""
        return ConfigError(*(problem.under(path) for problem in self.problems))

    def of(self, path: str, given: object = UNSET) -> ConfigError:
        """The same problems, attributed to the field that led to them."""
        return ConfigError(*(Problem(path, given, problem) for problem in self.problems))


def refuse(problems: Iterable[str], cause: BaseException | None = None) -> None:
    """Raises ConfigError if there are problems."""
    if found := tuple(problems):
        raise ConfigError(*found) from cause


def _shown(given: object) -> str:
    if type(given) is float:
        return plain(given)
    return repr(str(given) if isinstance(given, PurePath) else given)


def _choice(given: object, allowed: tuple[object, ...]) -> str:
    match = nearest(given, map(str, allowed)) if isinstance(given, str) else None
    return f"did you mean {match!r}?" if match else f"allowed: {', '.join(map(str, allowed)) or 'none'}"


def _shortened(text: str) -> str:
    """Shortens a long value in a problem: removes the middle."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class RunError(RuntimeError):
    """A run cannot continue; the message replaces a traceback, and the exit code is 1."""


def of_the_machine(error: BaseException) -> str:
    """The message of an error of the machine or its disk; "" for other errors."""
    if not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE:
        return ""
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning in one line, for `warnings.formatwarning` in a process of the command or of a job.

    One of this package reads as those in a run's log; one of another package says where it comes from.
    """
    text = " ".join(str(message).split())
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"WARNING: {text}\n"
    return f"{filename}:{lineno}: {category.__name__}: {text}\n"


def first_of(problems: Sequence[str], shown: int = 20) -> list[str]:
    """The first of many problems, and the number of the others."""
    more = len(problems) - shown
    return [*problems[:shown], *([Problem("", message=f"and {more:,} more")] if more > 0 else [])]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The closest of `names` to `name`; None if none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


class StopRequested(BaseException):
    """Someone asked the run to stop. It is not an Exception, so libraries do not handle it as a failure.

    Args:
        message: when it stopped, and why.
        requeue: whether the run continues later, or is cancelled.
    """

    def __init__(self, message: str, *, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue

    @property
    def exit_code(self) -> int:
        """The job's: 75 asks to be started again (EX_TEMPFAIL of sysexits.h), 130 is what a shell calls interrupted."""
        return 75 if self.requeue else 130
