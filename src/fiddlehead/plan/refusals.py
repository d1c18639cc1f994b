"""The plans with which no run is started, unless the user asks for it: too little memory, or too little time."""

from __future__ import annotations

from collections.abc import Sequence

from fiddlehead.errors import Problem, refuse
from fiddlehead.plan.training import TrainingPlan
from fiddlehead.run.prediction import Prediction

REFUSALS = ("memory", "time")
"""The names by which `despite` overrides them."""
DISK_BYTES_PER_S = 1e9
"""At which each node is taken to write its part of a checkpoint."""
SHOWN = 3
"""How many of a plan's remedies a refusal has."""


def refusals(plan: TrainingPlan, nodes: int = 1, time_limit: float | None = None) -> dict[str, Problem]:
    """Why a run with this plan would fail, by name; nothing is refused where the plan does not know.

    Args:
        nodes: how many write a checkpoint.
        time_limit: seconds that an attempt may take; None: no limit.
    """
    found = {"memory": _of_memory(plan), "time": _of_time(plan, nodes, time_limit)}
    return {name: problem for name, problem in found.items() if problem is not None}


def standing(found: dict[str, Problem], despite: Sequence[str]) -> list[Problem]:
    """The refusals that are not overridden.

    Args:
        despite: names in `REFUSALS`.

    Raises:
        ConfigError: it has another name.
    """
    refuse(Problem.unknown("despite", name, "refusal", REFUSALS) for name in despite if name not in REFUSALS)
    return [problem for name, problem in found.items() if name not in despite]


def predict(plan: TrainingPlan, despite: Sequence[str] = ()) -> Prediction:
    """What a plan predicts, to be compared with the run.

    Args:
        despite: the refusals that the user has overridden.
    """
    memory, speed, card = plan.memory, plan.speed, plan.card
    computing = None if speed is None else speed.products + speed.attention + speed.memory_bound + speed.bubble
    return Prediction(
        gpus=plan.world_size,
        max_steps=plan.max_steps,
        tokens_per_step=plan.tokens_per_step,
        gpu="" if card is None else card.name,
        gpu_gib=None if card is None else card.gib,
        needed_gib=None if memory is None else memory.needed_gib,
        memory_gib=None if memory is None else memory.peak / 2**30,
        tokens_per_s=None if speed is None else speed.tokens_per_s,
        mfu=None if speed is None else speed.mfu,
        seconds_per_step=None if speed is None else speed.step,
        seconds_computing=computing,
        seconds_communication=None if speed is None else speed.communication,
        seconds_optimizer=None if speed is None else speed.optimizer,
        despite=tuple(despite),
    )


def _of_memory(plan: TrainingPlan) -> Problem | None:
    memory, card = plan.memory, plan.card
    if plan.fits is not False or memory is None or card is None:
        return None
    lines = [
        f"the plan does not fit: it needs {memory.needed_gib:.1f} GiB of a GPU, {memory.needed_gib - card.gib:.1f} GiB "
        f"more than {card.name} has ({card.gib:.1f} GiB)",
        "no small change makes it fit; `fiddlehead plan --fit` searches all layouts of these GPUs",
        _anyway("memory"),
    ]
    if plan.remedies:
        lines[1:2] = ["what makes it fit:", *(f"  {each.row()}" for each in plan.remedies[:SHOWN])]
    return Problem("", message="\n".join(lines))


def _of_time(plan: TrainingPlan, nodes: int, time_limit: float | None) -> Problem | None:
    if time_limit is None or plan.speed is None or plan.card is None:
        return None
    step, saving = plan.speed.step, plan.checkpoint_bytes / (nodes * DISK_BYTES_PER_S)
    if step + saving <= time_limit:
        return None
    message = (
        f"of {time_limit:,.0f} s is too short for one step and one checkpoint, so the run would never get on: the plan "
        f"has {step:,.1f} s for a step on {plan.card.name}, and {saving:,.0f} s to write "
        f"{plan.checkpoint_bytes / 1e9:,.1f} GB at {DISK_BYTES_PER_S / 1e9:g} GB/s a node; give more time, or "
        f"{_anyway('time')}"
    )
    return Problem("executor.time", message=message)


def _anyway(name: str) -> str:
    return f"to start it all the same, --despite {name} (in Python despite=[{name!r}])"
