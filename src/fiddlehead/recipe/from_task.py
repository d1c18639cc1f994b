"""`from_task` names the parameters of a part that a recipe has beside the part, as arguments of its task.

    @from_task("optim")
    def __init__(self, config: TransformerConfig, *, optim: Optim | None = None) -> None: ...

A recipe says `recipe.optim`, and its model is built with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Constructor = TypeVar("Constructor", bound=Callable[..., Any])


def from_task(*names: str) -> Callable[[Constructor], Constructor]:
    """The decorator of a constructor whose parameters `names` are the task's arguments of the same names.

    `Recipe.build_arguments` passes them. They are not part of the signature, so a recipe cannot set them a second time.
    """

    def decorate(constructor: Constructor) -> Constructor:
        signature = inspect.signature(constructor)
        own = [each for name, each in signature.parameters.items() if name not in names]
        decorated: Any = constructor
        decorated.__signature__, decorated.__from_task__ = signature.replace(parameters=own), names
        return constructor

    return decorate


def names_from_task(function: Any) -> tuple[str, ...]:
    """The parameters of a class that take the task's arguments; a subclass's own constructor decides for itself."""
    return getattr(getattr(function, "__init__", None), "__from_task__", ())
