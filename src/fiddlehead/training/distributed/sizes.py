"""The sizes of a run's device mesh, and the number of parameters on each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.parallel import first_layers, is_tied, rank_of_stage, splits_over, stage_of

MESH = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
"""The dimensions of the device mesh, from the slowest to the fastest. Tensor parallelism communicates most, so its
ranks are neighbours; a pipeline communicates least."""


@dataclass(frozen=True)
class Counted:
    """How many parameters a model has, by the place that they have in it and by what they are split over."""

    config: TransformerConfig
    numbers: Mapping[tuple[str, str | None], int]
    """By "layers.3." or by the name of a parameter outside the layers; and by "tp", "ep" or None."""
    _of_stages: dict[int, list[Counter[str | None]]] = field(default_factory=dict, compare=False, repr=False)

    def of_stages(self, count: int) -> list[Counter[str | None]]:
        """The numbers of each of so many stages, by what they are split over."""
        if count not in self._of_stages:  # a search asks for them a thousand times
            stages, first = [Counter[str | None]() for _ in range(count)], first_layers(self.config, count)
            for (place, split_over), number in self.numbers.items():
                stage = stage_of(place, first)
                for each in {stage, count - 1} if is_tied(place, self.config) else {stage}:
                    stages[each][split_over] += number
            self._of_stages[count] = stages
        return self._of_stages[count]

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
    folded: bool = False
    """Whether the stages go along the ranks and back, as `rank_of_stage` has it."""

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes in the order of `MESH`."""
        shard = self.data // self.replicate // self.expert
        return self.pipeline, self.replicate, shard, self.expert, self.context, self.tensor

    @property
    def fsdp(self) -> bool:
        """Whether FSDP2 has the parameters, which it copies to gather them, and casts while it does.

        Ranks that differ only in their tensor-parallel part gather nothing, and train as one device does: with float32
        parameters and autocast. The ranks of a pipeline gather nothing either, but autocast would cast their layers
        for each micro-batch, and keep the copies of all those in flight; FSDP2 casts them once in a step.
        """
        return self.data * self.context * self.pipeline > 1

    def data_rank(self, rank: int) -> int:
        """The data-parallel index of a rank: ranks that share layers or a sequence have the same index and samples."""
        return rank // (self.context * self.tensor) % self.data

    def pipeline_rank(self, stage: int) -> int:
        """The rank of a pipeline that has a stage."""
        return rank_of_stage(stage, self.pipeline, self.folded)

    def layers_of_ranks(self, config: TransformerConfig) -> tuple[int, ...]:
        """The number of layers on each rank of a pipeline."""
        return _layers_of_ranks(self.pipeline, self.folded, first_layers(config, self.stages))

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
        for stage, numbers in enumerate(counted.of_stages(self.stages)):
            of_ranks[self.pipeline_rank(stage)] += sum(number / parts(dim) for dim, number in numbers.items())
        return max(of_ranks)


@lru_cache(maxsize=1024)
def _layers_of_ranks(ranks: int, folded: bool, first: tuple[int, ...]) -> tuple[int, ...]:
    layers = [0] * ranks
    for stage, (start, end) in enumerate(pairwise(first)):
        layers[rank_of_stage(stage, ranks, folded)] += end - start
    return tuple(layers)
