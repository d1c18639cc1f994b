"""Builds the parts of a recipe for a plan, also for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import working_directory
from fiddlehead.launch.fitting import GPU
from fiddlehead.numbers import is_number
from fiddlehead.recipe import Recipe

if TYPE_CHECKING:
    from fiddlehead.attention import Target
    from fiddlehead.plan.cards import Card


@contextmanager
def built(recipe: Recipe, target: Target | Card | Literal["unknown"] | None) -> Iterator[tuple[dict[str, Any], Any]]:
    """Builds the parts of a recipe, the model on the meta device, for the block; also gives the target that plans take.

    Args:
        target: the device for which kernels are chosen; None means the trainer's device on this machine.

    Raises:
        ConfigError: with every problem.
    """
    from fiddlehead import bench, tasks
    from fiddlehead.plan.cards import Card
    from fiddlehead.plan.training import begin
    from fiddlehead.run import workers

    trainings = (tasks.pretrain, tasks.finetune, bench.benchmark)
    if recipe.__fn_or_cls__ not in trainings:
        known = ", ".join(f"{task.__module__}:{task.__name__}" for task in trainings)
        raise ConfigError(f"the recipe configures {recipe.__fn_or_cls__.__qualname__}; what can be launched: {known}")
    working_directory()  # what is relative is in it
    recipe = recipe.clone()
    elsewhere = target is not None and recipe.trainer.accelerator in GPU
    if isinstance(target, Card) and not elsewhere:
        if recipe.trainer.accelerator != "auto":
            message = f"has no use for the GPU {target.name}, for which the plan is"
            raise ConfigError(Problem("trainer.accelerator", recipe.trainer.accelerator, message, ("gpu", "auto")))
        elsewhere = True
    if elsewhere:
        recipe.trainer.accelerator = "cpu"  # so that Lightning does not look for the GPUs
    unlike = _kept_from_lightning(recipe)
    with workers.apart():
        parts = recipe.build_arguments()
        if "precision" in unlike:
            parts["trainer"].strategy.precision_plugin.precision = unlike["precision"]
        if "val_check_interval" in unlike:
            parts["trainer"].val_check_interval = unlike["val_check_interval"]
        begin(*(parts[name] for name in ("model", "data", "trainer", "optim")))
        yield parts, "trainer" if not elsewhere else None if target == "unknown" else target


def _kept_from_lightning(recipe: Recipe) -> dict[str, Any]:
    """Takes values out of the trainer's configuration that a plan refuses with a reason, and returns them.

    Lightning would refuse them in words of its own, or replace them: float16 on a CPU is bfloat16.
    """
    trainer, unlike = recipe.trainer, dict[str, Any]()
    if str(trainer.precision) in ("16", "16-mixed"):
        unlike["precision"], trainer.precision = "16-mixed", "32-true"
    interval = trainer.val_check_interval
    by_time = interval is not None and not is_number(interval)  # a text such as "00:01:00:00", a dict or a timedelta
    if by_time or (isinstance(interval, float) and interval != 1.0 and trainer.check_val_every_n_epoch is None):
        unlike["val_check_interval"], trainer.val_check_interval = interval, 1
    return unlike
