"""Checks that a run's name is free for a recipe: no run has it, or an ended run of the same recipe."""

from __future__ import annotations

import fiddle as fdl

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.launch import watch
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.fields import may_change
from fiddlehead.recipe.leaves import leaves, show
from fiddlehead.run import RunDirectory, damage
from fiddlehead.run.alive import is_here, way_out


def refuse_taken(run: RunDirectory, recipe: Recipe) -> None:
    """Raises ConfigError if the run is active, or belongs to another recipe."""
    if run.path.exists():
        refuse(damage.in_the_way(run))
    (before,) = watch.states([run])
    if before is not None and not before.state.ended:
        gone = "" if is_here(before) else f" ({way_out(run.name)})"
        message = (
            f"is running ({before.state}, process {before.pid} on {before.host}); cancel it with `fiddlehead runs "
            f"cancel {run.name}`{gone}, or choose another name"
        )
        raise ConfigError(Problem("log.name", run.name, message))
    if not run.recipe.exists():
        if run.path.exists() and (not run.path.is_dir() or any(each.name != ".lock" for each in run.path.iterdir())):
            raise ConfigError(Problem("log.name", run.name, f"{run.path} exists and is not a run; choose another name"))
        return
    try:
        earlier = Recipe.load(run.recipe, allow=recipe.names_to_allow())
    except ConfigError as error:
        advice = Problem("log.name", run.name, "its recipe cannot be read; repair that file, or choose another name")
        raise ConfigError(*(Problem("", message=problem) for problem in error.problems), advice) from error
    free = {*_resumable_paths(recipe), *_resumable_paths(earlier)}
    differences = [
        difference
        for difference in recipe.diff(earlier)
        if not any(difference.path == path or difference.path.startswith((f"{path}.", f"{path}[")) for path in free)
    ]
    if differences:
        lines = "\n".join(f"  {d.path}: {show(d.right)} before, {show(d.left)} now" for d in differences)
        message = f"is another recipe's run; choose another name, or undo:\n{lines}"
        raise ConfigError(Problem("log.name", run.name, message))


def _resumable_paths(recipe: Recipe) -> list[str]:
    """The paths in a recipe, with all below them, that may change when its run continues."""
    found = []
    for leaf in leaves(recipe, defaults=True):
        function = fdl.get_callable(leaf.owner)
        if not isinstance(leaf.key, str) or leaf.key not in leaf.owner.__signature_info__.parameters:
            continue
        if may_change(function, leaf.key):
            found.append(leaf.path)
    return found
