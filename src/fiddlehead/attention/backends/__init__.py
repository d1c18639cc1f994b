"""The kernels behind `attend`. Each file says which calls one kernel cannot serve, why, and how to run it.

Every module of this folder that defines `why_not` is a backend. Importing this package finds it; no list names it.
`backend.py` says what such a module must define.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, cast

from fiddlehead.attention.backends.backend import Backend
from fiddlehead.errors import ConfigError, Problem

BACKENDS: dict[str, Backend] = {}
"""Every backend by name, in the order of `PLACE`."""
VARIABLES: list[bytes] = []
"""The environment variables that turn backends off, as `os.environ` keeps them."""
changes = 0
"""The number of changes of the backends. A choice from before the last change may no longer hold."""
RESERVED = ("auto", "measured")
"""The possible values of `backend` besides the names of backends."""


def register(backend: Backend) -> None:
    """Adds a backend, such as a module of your own, to those that `attend` chooses from.

    Nothing is registered automatically: call this in code that your recipe or your script imports.

    Args:
        backend: a module or an object with all names of `Backend`. The same one may be registered again.

    Raises:
        ConfigError: it lacks one of these names, its name is taken, or one has the wrong type.
    """
    if problem := _problem(backend):
        raise ConfigError(f"attention backend {getattr(backend, '__name__', backend)!s}: {problem}")
    if BACKENDS.get(backend.NAME) is backend:
        return
    _set({**BACKENDS, backend.NAME: backend})


def unregister(name: str) -> None:
    """Removes a backend, for example to register a changed one.

    Raises:
        ConfigError: there is no backend of this name.
    """
    if name not in BACKENDS:
        raise ConfigError(Problem.unknown("name", name, "attention backend", BACKENDS))
    _set({other: backend for other, backend in BACKENDS.items() if other != name})


def _set(backends: dict[str, Backend]) -> None:
    """Makes these the backends. It works in place, because other modules hold the same dictionary."""
    global changes
    changes += 1
    ordered = sorted(backends.items(), key=lambda item: item[1].PLACE)
    BACKENDS.clear()
    BACKENDS.update(ordered)
    variables = (variable.encode() for _, backend in ordered for variable in backend.SWITCHES)
    VARIABLES[:] = dict.fromkeys(variables)


def _problem(backend: Any) -> str | None:
    """Why this is not a backend; None if it is one."""
    needed = ("NAME", "PLACE", "SWITCHES", "place", "why_not", "run")
    if missing := [name for name in needed if not hasattr(backend, name)]:
        return f"has no {', '.join(missing)}; a backend needs {', '.join(needed)}"
    name, switches = backend.NAME, backend.SWITCHES
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
        return Problem("NAME", name, f"must be an identifier such as 'my_kernel', and not {' or '.join(RESERVED)}")
    if BACKENDS.get(name, backend) is not backend:
        return Problem("NAME", name, f"is taken; the backends are {', '.join(BACKENDS)}; `unregister` removes one")
    if isinstance(backend.PLACE, bool) or not isinstance(backend.PLACE, int | float):
        return Problem("PLACE", backend.PLACE, "must be a number")
    if not isinstance(switches, tuple | list) or not all(isinstance(variable, str) for variable in switches):
        return Problem("SWITCHES", switches, "must be a tuple of names of environment variables; () for none")
    if uncallable := [name for name in ("place", "why_not", "run") if not callable(getattr(backend, name))]:
        return f"{', '.join(uncallable)}: must be functions"
    return None


def _modules() -> Iterator[Backend]:
    """The modules of this folder that are backends."""
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "why_not"):
            yield cast(Backend, module)


for _backend in sorted(_modules(), key=lambda module: module.PLACE):
    register(_backend)
