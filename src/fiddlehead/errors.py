"""Errors that are written for the person who typed the command."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence

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


class Elsewhere(str):
    """A problem that begins with its own place, such as a file and a line, and not with a field of the recipe."""

    __slots__ = ()


class ConfigError(ValueError):
    """What a user asked for cannot be done; the command prints it without a traceback and exits with 2.

    Each problem is a line that starts with the name of the field at fault and says what was given and what is
    allowed, for example ``num_query_groups=3 does not divide num_attention_heads=8; allowed: 1, 2, 4, 8``. Whoever
    knows where the field sits puts the path in front with `under`. A problem that does not begin with a field is an
    `Elsewhere`.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_shortened(problem) for problem in problems)
        super().__init__("\n".join(self.problems))

    def under(self, path: str) -> ConfigError:
        """The same problems, each that begins with a field with `path` and a dot in front."""
        return ConfigError(*(p if isinstance(p, Elsewhere) or not path else f"{path}.{p}" for p in self.problems))


def _shortened(problem: str) -> str:
    """Without the middle, where a problem repeats a value that nobody reads to its end."""
    if len(problem) <= _LONGEST:
        return problem
    return type(problem)(f"{problem[: _LONGEST // 2]} ... {problem[-_LONGEST // 2 :]}")  # an `Elsewhere` stays one


class RunError(RuntimeError):
    """A run cannot go on, for a reason that its message says better than a traceback; exit code 1."""


def of_the_machine(error: BaseException) -> str:
    """A line that says what the machine or its disk refused, if that is what `error` is; "" for any other."""
    if not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE:
        return ""
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)


def first_of(problems: Sequence[str], shown: int = 20) -> list[str]:
    """The first of many problems, and how many more there are."""
    more = len(problems) - shown
    return [*problems[:shown], *([Elsewhere(f"and {more:,} more")] if more > 0 else [])]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` was most likely meant to be, or None if none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(what: str, name: str, allowed: Sequence[str]) -> str:
    """A sentence for a name that is not among `allowed`: the nearest one, or else the allowed ones."""
    match = nearest(name, allowed)
    if match:
        return f"unknown {what} {name!r}; did you mean {match!r}?"
    return f"unknown {what} {name!r}; allowed: {', '.join(allowed) if allowed else 'none'}"


class StopRequested(BaseException):
    """Someone asked the run to stop; not an Exception, so that no library takes it for a failure of its own.

    Args:
        message: when it stopped, and why.
        requeue: whether it is to go on later, or is cancelled.
    """

    def __init__(self, message: str, *, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue

    @property
    def exit_code(self) -> int:
        """The job's: 75 asks to be started again (EX_TEMPFAIL of sysexits.h), 130 is what a shell calls interrupted."""
        return 75 if self.requeue else 130
