"""The sizes of a run's device mesh, and the number of parameters on each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.parallel import is_tied, splits_over, stage_of

MESH = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
"""The dimensions of the device mesh, from the slowest to the fastest. Tensor parallelism communicates most, so its
ranks are neighbours; a pipeline communicates least."""


@dataclass(frozen=True)
class Counted:
    """How many parameters a model has, by the place that they have in it and by what they are split over."""

    config: TransformerConfig
    numbers: Mapping[tuple[str, str | None], int]
    """By "layers.3." or by the name of a parameter outside the layers; and by "tp", "ep" or None."""

    @classmethod
    def of(cls, transformer: Transformer, *, trained: bool = False) -> Counted:
        """Those of a complete model, or of its parameters that are `trained`."""
        config, numbers = transformer.config, Counter[tuple[str, str | None]]()
        for name, parameter in transformer.named_parameters():
            if trained and not parameter.requires_grad:
                continue
            layer, inside, _ = name.removeprefix("layers.").partition(".")
            place = f"layers.{layer}." if name.startswith("layers.") and inside else name
            numbers[place, splits_over(name, config)] += parameter.numel()
        return cls(config, numbers)


@dataclass(frozen=True)
class Sizes:
    """The number of ranks along each dimension."""

    data: int
    """Ranks that train on different samples."""
    replicate: int
    """Replicas of the model among them."""
    expert: int = 1
    """Ranks of a replica with different experts."""
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    """Ranks of a replica with different layers."""
    stages: int = 1
    """The number of pipeline stages; a rank may have several."""

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes in the order of `MESH`."""
        shard = self.data // self.replicate // self.expert
        return self.pipeline, self.replicate, shard, self.expert, self.context, self.tensor

    def data_rank(self, rank: int) -> int:
        """The data-parallel index of a rank: ranks that share layers or a sequence have the same index and samples."""
        return rank // (self.context * self.tensor) % self.data

    def held(self, counted: Counted) -> float:
        """The largest number of a model's parameters that a rank keeps."""
        cut = self.data // self.replicate * self.context
        return self._most(counted, lambda split_over: cut * (self.tensor if split_over == "tp" else 1))

    def gathered(self, counted: Counted) -> float:
        """The number of parameters, and of gradients, that a rank of a pipeline keeps gathered during a whole step.

        Without a pipeline, ranks gather one layer at a time.
        """
        if self.pipeline == 1 or self.data // self.replicate * self.context == 1:
            return 0
        return self._most(counted, lambda dim: {"tp": self.tensor, "ep": self.expert}.get(dim or "", 1))

    def _most(self, counted: Counted, parts: Callable[[str | None], int]) -> float:
        """The largest number on a rank; `parts` of a dimension ("tp", "ep", None) divides the parameters it splits."""
        of_ranks = [0.0] * self.pipeline
        for (place, split_over), number in counted.numbers.items():
            rank = stage_of(place, counted.config, self.stages) % self.pipeline
            for each in {rank, self.pipeline - 1} if is_tied(place, counted.config) else {rank}:
                of_ranks[each] += number / parts(split_over)
        return max(of_ranks)
