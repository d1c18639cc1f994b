"""`Resumable` marks a field that may change when a run goes on from its checkpoint.

    compile: Resumable[Compile | None] = None

A change of any other field makes another run, which needs another name.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any, TypeVar

T = TypeVar("T")

TRAINER = frozenset(
    {
        *("accelerator", "devices", "num_nodes", "strategy"),
        *("max_steps", "log_every_n_steps", "val_check_interval", "limit_val_batches"),
    }
)
"""The arguments of Lightning's Trainer that may change when a run continues: its devices, its length, and how often it
logs and validates. We cannot mark them there."""


_MARKER = "may change when a run goes on"
Resumable = Annotated[T, _MARKER]
"""The type of a parameter that, with all below it, may change when a run continues."""


def unmarked(hint: Any) -> Any:
    """The annotation without the mark."""
    if not is_marked(hint):
        return hint
    others = tuple(each for each in hint.__metadata__ if each is not _MARKER)
    return Annotated[(hint.__origin__, *others)] if others else hint.__origin__  # type: ignore[return-value]


def is_marked(hint: Any) -> bool:
    """Whether an annotation has the mark."""
    return typing.get_origin(hint) is Annotated and _MARKER in hint.__metadata__
