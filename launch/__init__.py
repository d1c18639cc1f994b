"""Planning and starting runs. `plan` describes a run, `launch` also starts it; each executor is one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fiddlehead.launch.executor import Executor
from fiddlehead.launch.layouts import fitted, search
from fiddlehead.launch.planning import Plan, plan
from fiddlehead.launch.submit import RunFailedError
from fiddlehead.recipe import Recipe
from fiddlehead.run import RunDirectory

__all__ = ["Executor", "Plan", "RunFailedError", "fitted", "launch", "plan", "search"]


def launch(
    recipe: Recipe,
    executor: Any = None,
    *,
    name: str | None = None,
    detach: bool = False,
    allow: Sequence[str] = (),
    despite: Sequence[str] = (),
    command: str | None = None,
    after: Sequence[RunDirectory] = (),
    after_any: Sequence[RunDirectory] = (),
) -> RunDirectory:
    """Plans a recipe and submits the plan: `plan` and `Plan.submit` have the arguments and errors.

    Prints the recipe's settings that the executor overrides.
    """
    made = plan(recipe, executor, waits=bool(after or after_any))
    for sentence in made.changed:
        print(f"changed: {sentence}")  # noqa: T201
    return made.submit(
        name=name, detach=detach, allow=allow, despite=despite, command=command, after=after, after_any=after_any
    )
