"""How a run's ranks are arranged, and how much of a model falls to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fiddlehead.models import Transformer
from fiddlehead.models.parallel import splits_over, stage_of

MESH = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
"""The dimensions of the device mesh, from the slowest to the fastest: tensor parallelism talks most, so that its ranks
are neighbours, and a pipeline least."""


@dataclass(frozen=True)
class Sizes:
    """How many ranks there are along each dimension."""

    data: int
    """Ranks that train on different samples."""
    replicate: int
    """Copies of the model among them."""
    expert: int = 1
    """Ranks, among those of a copy, that have different experts."""
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    """Ranks that have different layers of a copy."""
    stages: int = 1
    """Into how many parts of consecutive layers it is cut for them; several of these may be one rank's."""

    @property
    def mesh(self) -> tuple[int, ...]:
        """In the order of `MESH`."""
        shard = self.data // self.replicate // self.expert
        return self.pipeline, self.replicate, shard, self.expert, self.context, self.tensor

    def data_rank(self, rank: int) -> int:
        """Which samples a rank trains on: ranks that share a model's layers or a sequence have the same."""
        return rank // (self.context * self.tensor) % self.data

    def held(self, transformer: Transformer) -> float:
        """How many of a model's parameters the rank keeps that has the most of them."""
        cut = self.data // self.replicate * self.context
        return self._most(transformer, lambda split_over: cut * (self.tensor if split_over == "tp" else 1))

    def gathered(self, transformer: Transformer) -> float:
        """How many parameters, and gradients of them, a rank of a pipeline has gathered from a step's begin to its end.

        Other ranks gather a layer when it is its turn.
        """
        if self.pipeline == 1 or self.data // self.replicate * self.context == 1:
            return 0
        return self._most(transformer, lambda dim: {"tp": self.tensor, "ep": self.expert}.get(dim or "", 1))

    def _most(self, transformer: Transformer, parts: Callable[[str | None], int]) -> float:
        """The sum of what a rank has, where `parts` of what "tp", "ep" or nothing splits make the whole."""
        config, of_ranks = transformer.config, [0.0] * self.pipeline
        for name, parameter in transformer.named_parameters():
            rank = stage_of(name, config, self.stages) % self.pipeline
            of_ranks[rank] += parameter.numel() / parts(splits_over(name, config))
        return max(of_ranks)
