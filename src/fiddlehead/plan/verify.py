"""Whether the GPU that a job got is the one that its plan was made for."""

from __future__ import annotations

import os

import torch

from fiddlehead.environment import free_main_memory
from fiddlehead.errors import refuse
from fiddlehead.plan.cards import PCIE
from fiddlehead.plan.refusals import refusals, standing
from fiddlehead.plan.training import TrainingPlan
from fiddlehead.run.prediction import Prediction


def differences(launched: Prediction | None, plan: TrainingPlan, device: torch.device) -> list[str]:
    """What to warn of: how this GPU and its machine differ from those of the plan.

    Args:
        launched: what the launcher has written down; None if it has written nothing, or nobody has launched the run.
        plan: the plan for `device`.

    Raises:
        ConfigError: the run was launched, its plan does not fit this GPU, and the user has not overridden that.
    """
    found = refusals(plan)
    if launched is not None:
        refuse(standing(found, launched.despite))
    card, said = plan.card, [str(problem) for problem in found.values()]
    if card is None or device.type != "cuda":
        return said
    if launched is not None and launched.gpu and launched.gpu not in (card.name, card.sheet):
        had = "" if launched.gpu_gib is None else f" with {launched.gpu_gib:.1f} GiB"
        said.append(f"the plan was for {launched.gpu}{had}, and this GPU is {card.name} with {card.gib:.1f} GiB")
    if launched is not None and launched.gpus != plan.world_size:
        said.append(f"the plan was for {launched.gpus} GPUs, and the run has {plan.world_size}")
    return [*said, *_memory_taken(plan, device), *_main_memory_taken(plan), *_slow_links(plan, device)]


def _memory_taken(plan: TrainingPlan, device: torch.device) -> list[str]:
    """Whether others have taken memory of the GPU that the run needs; this process has none yet, but its context."""
    if plan.memory is None or not plan.fits:
        return []
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    needed = plan.memory.needed_gib - plan.memory.outside / 2**30
    if free >= needed:
        return []
    return [f"{free:.1f} GiB of the GPU are free, and the run needs {needed:.1f}: `nvidia-smi` shows who has the rest"]


def _main_memory_taken(plan: TrainingPlan) -> list[str]:
    """Whether this machine has too little main memory for what its processes keep there instead of on their GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = processes * sum(plan.main_memory.values()) / 2**30, free_main_memory() / 2**30
    if free >= needed:
        return []
    each = f" by each of {processes} processes" if processes > 1 else ""
    return [f"{free:.1f} GiB of main memory are free, and {needed / processes:.1f} GiB are needed{each}"]


def _slow_links(plan: TrainingPlan, device: torch.device) -> list[str]:
    """Whether the plan counts on NVLink, and the GPUs of this node cannot reach each other's memory."""
    if plan.world_size == 1 or plan.card is None or plan.card.link_bytes_per_s <= PCIE:
        return []
    own = device.index or 0
    apart = [
        other
        for other in range(torch.cuda.device_count())
        if other != own and not torch.cuda.can_device_access_peer(own, other)
    ]
    if not apart:
        return []
    others = ", ".join(map(str, apart))
    return [f"GPU {own} cannot reach the memory of GPU {others}: they exchange slower than the plan's NVLink does"]
