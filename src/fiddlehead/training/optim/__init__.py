"""Optimizers and learning-rate schedules; each optimizer is one file."""

from collections.abc import Mapping, Sequence
from typing import Any

from fiddlehead.training.optim.adamw import AdamW
from fiddlehead.training.optim.muon import Muon
from fiddlehead.training.optim.optim import Optim
from fiddlehead.training.optim.schedules import CosineAnnealing, Schedule, WarmupStableDecay, course

__all__ = [
    "AdamW", "CosineAnnealing", "Muon", "Optim", "Schedule", "WarmupStableDecay", "course", "kind_of", "of_bfloat16",
]  # fmt: skip


def kind_of(groups: Sequence[Mapping[str, Any]]) -> str:
    """The name of the optimizer that wrote these groups of a checkpoint."""
    if "kind" in groups[0]:
        return groups[0]["kind"]
    # Checkpoints of earlier versions, which knew these two.
    if "momentum" in groups[0]:
        return "Muon"
    return AdamW(state_bits=groups[0].get("state_bits", 32)).kind


def of_bfloat16(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `AdamW` wrote these groups for bfloat16 parameters, with an optimizer of ours; the other is PyTorch's."""
    return "amsgrad" not in groups[0]
