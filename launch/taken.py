"""Whether a run's name is free for a recipe: no run has it, or one that ended and was of the same recipe."""

from __future__ import annotations

from fiddlehead.errors import ConfigError, Elsewhere
from fiddlehead.launch import watch
from fiddlehead.recipe import Recipe
from fiddlehead.run import RunDirectory, damage
from fiddlehead.run.directory import is_here, way_out

FREE_TO_CHANGE = (
    # How long, how often and how loud a run is, and what it runs on: none of it makes it another run.
    "trainer.max_steps",
    "trainer.log_every_n_steps",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.accelerator",
    "model.compile",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "data.micro_batch_size",
    "data.num_workers",
    "data.cache_dir",
    "data.corpus",  # another one is not known yet, and `paths` says for itself
    "model.config.attention_backend",
    "resume",
)


def refuse_taken(run: RunDirectory, recipe: Recipe) -> None:
    """Raises ConfigError if the run is running, or was another recipe's."""
    if run.path.exists() and (problems := damage.in_the_way(run)):
        raise ConfigError(*(Elsewhere(problem) for problem in problems))
    (before,) = watch.states([run])
    if before is not None and not before.state.ended:
        gone = "" if is_here(before) else f" ({way_out(run)})"
        raise ConfigError(
            f"log.name={run.name!r} is running ({before.state}, process {before.pid} on {before.host}); "
            f"cancel it with `fiddlehead runs cancel {run.name}`{gone}, or choose another name"
        )
    if not run.recipe.exists():
        if run.path.exists() and (not run.path.is_dir() or any(each.name != ".lock" for each in run.path.iterdir())):
            raise ConfigError(f"log.name={run.name!r}: {run.path} is there and is not a run; choose another name")
        return
    try:
        earlier = Recipe.load(run.recipe, allow=recipe.names_to_allow())
    except ConfigError as error:
        advice = f"log.name={run.name!r}: its recipe cannot be read; mend that file, or choose another name"
        raise ConfigError(*map(Elsewhere, error.problems), advice) from error
    differences = [
        difference
        for difference in recipe.diff(earlier)
        if difference.path not in FREE_TO_CHANGE
        and not difference.path.startswith(("log.", "checkpoint.", "trainer.strategy."))
    ]
    if differences:
        lines = "\n".join(f"  {d.path}: {d.right!r} before, {d.left!r} now" for d in differences)
        raise ConfigError(f"log.name={run.name!r} is another recipe's run; choose another name, or undo:\n{lines}")
