"""The environment variables that turn backends off, as in NVIDIA's Transformer Engine."""

from __future__ import annotations

import os

import torch

from fiddlehead.attention import backends
from fiddlehead.attention.backends import BACKENDS, VARIABLES
from fiddlehead.attention.backends.backend import Backend

DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
_DETERMINISM = DETERMINISM.encode()

Setting = tuple[object, ...]
"""The values of all the variables at one moment."""

# The dictionary inside os.environ: asking it takes a tenth of the time, and torch.compile sees when it changes.
_environ: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]


def setting() -> Setting:
    """The variables' values and the state of the backends: a selection depends on them."""
    # Without a loop in Python: this is asked at every call of `attend`.
    values = tuple(map(_environ.get, VARIABLES))
    return values, _environ.get(_DETERMINISM), torch.are_deterministic_algorithms_enabled(), backends.changes


def by_variable() -> dict[str, tuple[str, ...]]:
    """Each variable, and the backends that it turns off when it is 0."""
    variables = dict.fromkeys(variable for backend in BACKENDS.values() for variable in backend.SWITCHES)
    return {
        variable: tuple(name for name, backend in BACKENDS.items() if variable in backend.SWITCHES)
        for variable in variables
    }


def turned_off(backend: Backend) -> str | None:
    """The variable that turns the backend off; None if none does."""
    return next((variable for variable in backend.SWITCHES if os.environ.get(variable) == "0"), None)


def must_be_deterministic() -> bool:
    """Whether PyTorch's flag or Transformer Engine's variable asks for the same gradients each time."""
    return torch.are_deterministic_algorithms_enabled() or os.environ.get(DETERMINISM) == "0"
