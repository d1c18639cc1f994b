"""Pipeline parallelism: ranks have different layers and pass micro-batches on, by torch's schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fiddlehead.checkpoints.sharding import ShardedTensor
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.parallel import (
    Layout,
    Stage,
    first_layers,
    is_tied,
    keep_stages,
    local,
    rank_of_stage,
    refuse_stages,
    stage_of,
)
from fiddlehead.training.optim import Optim

Batch = Mapping[str, Any]
Schedule = Literal["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
"""In which order a rank of a pipeline computes its micro-batches, by the names of torch's schedules.

- "1F1B" (Narayanan et al. 2019); with several stages on each rank it is interleaved (Narayanan et al. 2021).
- The others compute the gradients of weights later than those that the rank before waits for, while they would wait
  (Qi et al. 2023): "InterleavedZeroBubble" is their ZB1P, "ZBVZeroBubble" their ZB-V. "DualPipeV" (DeepSeek-AI 2025)
  also computes the forward pass of a micro-batch beside the backward pass of another one.
"""
FOLDED = ("ZBVZeroBubble", "DualPipeV")
"""The schedules for two stages on each rank, the second ones in reverse order."""


class Pipeline:
    """This rank's stages of a model, and their schedule.

    Args:
        transformer: the whole model, on the meta device; it is reduced to this rank's stages.
        mesh: a mesh with the dimension "pp".
        dtype: the dtype of the layers' outputs.
        schedule: in which order a rank computes its micro-batches.
    """

    def __init__(
        self,
        transformer: Transformer,
        mesh: DeviceMesh,
        stages_per_rank: int,
        dtype: torch.dtype,
        schedule: Schedule = "1F1B",
    ) -> None:
        self.config, self.dtype, self.schedule = transformer.config, dtype, schedule
        self.group, self.ranks = mesh.get_group("pp"), mesh["pp"].size()
        self.count = self.ranks * stages_per_rank
        self.transformer, self.fused = transformer, transformer.fused_rows()
        self.whole = dict(transformer.named_parameters())
        """The parameters of the whole model, without values."""
        rank = mesh.get_local_rank("pp")
        numbers = [number for number in range(self.count) if self._rank_of(number) == rank]
        keep_stages(transformer, numbers, self.count)
        self.stages = [Stage(transformer, number, self.count) for number in numbers]
        self.waiting: list[Batch] = []
        """Micro-batches of the step, until the last one has arrived."""
        self._schedule: Any = None

    @property
    def tied(self) -> frozenset[str]:
        """The parameters that both the first and the last rank have, by their names in a `LanguageModel`."""
        if self.schedule in FOLDED:
            return frozenset()
        return frozenset(f"transformer.{name}" for name in self.whole if is_tied(name, self.config))

    # -- training

    def train(self, labels: torch.Tensor | int, tokens: torch.Tensor | int) -> torch.Tensor:
        """Adds the gradients of the mean loss of the waiting micro-batches; returns their cross-entropy on every rank.

        All micro-batches have one shape.

        Args:
            labels: the divisor of the sum of the cross-entropy.
            tokens: the divisor of the balancing loss of a mixture.
        """
        batches, self.waiting = self.waiting, []
        device = batches[0]["input_ids"].device
        if self._schedule is None:
            self._schedule = self._make_schedule(batches)
        for stage in self.stages:
            stage.take(batches, labels * len(batches), 1 / (tokens * len(batches)))
        # The stages have the batches already; the schedule only splits and counts these placeholders.
        counted = torch.zeros(len(batches), device=device)
        inputs, target = [counted] if self.stages[0].first else [], counted if self.stages[-1].last else None
        losses: list[torch.Tensor] = []
        self._schedule.step(*inputs, target=target, losses=losses)
        # Ranks without the last stage have no loss. In float32, whatever the default dtype is.
        loss = sum((each.detach().float() for each in losses), torch.zeros((), dtype=torch.float32, device=device))
        dist.all_reduce(loss, group=self.group)
        return loss

    def sum_tied_gradients(self) -> None:
        """Completes the gradients of tied embeddings: the first rank has that of the input, the last of the output."""
        end = {0: self.ranks - 1, self.ranks - 1: 0}.get(dist.get_rank(self.group))
        gradient = None if end is None or not self.tied else self.transformer.embedding.weight.grad
        if gradient is None:
            return
        own = local(gradient)
        other = torch.empty_like(own)
        both = [
            dist.P2POp(dist.isend, own, group=self.group, group_peer=end),
            dist.P2POp(dist.irecv, other, group=self.group, group_peer=end),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        own.add_(other)

    def nats(self, batch: Batch) -> torch.Tensor | None:
        """The sum of the cross-entropy, without gradients, on the rank with the last stage; None on the others."""
        rank = dist.get_rank(self.group)
        x = self._like_stream(batch, batch["input_ids"].device)
        for stage in self.stages:
            if not stage.first and (source := self._rank_of(stage.number - 1)) != rank:
                x = self._like_stream(batch, batch["input_ids"].device)
                dist.recv(x, group=self.group, group_src=source)
            stage.take([batch])
            x = stage(x)
            if stage.last:
                return x.sum()
            if (following := self._rank_of(stage.number + 1)) != rank:
                dist.send(x.contiguous(), group=self.group, group_dst=following)
        return None

    def _make_schedule(self, batches: Sequence[Batch]) -> Any:
        # It imports PyTorch's compiler, which a plan does not need.
        from torch.distributed import pipelining

        count = len(batches)
        device = batches[0]["input_ids"].device
        # NCCL connects a group when all its ranks first meet; in the schedule only neighbours do.
        dist.all_reduce(torch.zeros((), device=device), group=self.group)
        stream = self._like_stream(batches[0], torch.device("meta")).requires_grad_()
        counted = torch.empty(1, device="meta")
        nats = torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
        stages = [
            pipelining.PipelineStage(
                stage,
                stage.number,
                self.count,
                device,
                input_args=counted if stage.first else stream,
                output_args=nats if stage.last else stream,
                group=self.group,
            )
            for stage in self.stages
        ]
        how: dict[str, Any] = {"loss_fn": lambda nats, _: nats.sum(), "scale_grads": False}
        if self.schedule != "1F1B":
            return getattr(pipelining, f"Schedule{self.schedule}")([*stages], count, **how)
        if len(stages) == 1:
            return pipelining.Schedule1F1B(stages[0], count, **how)
        return pipelining.ScheduleInterleaved1F1B([*stages], count, **how)

    def _rank_of(self, stage: int) -> int:
        return rank_of_stage(stage, self.ranks, self.schedule in FOLDED)

    def _like_stream(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """An empty tensor like a stage's output, (B, T, C)."""
        return torch.empty(*batch["input_ids"].shape, self.config.hidden_size, dtype=self.dtype, device=device)

    # -- other ranks' parameters

    def holder(self, name: str) -> int:
        """The rank that has a parameter."""
        return self._rank_of(stage_of(name, first_layers(self.config, self.count)))

    def completed(self, own: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
        """Returns the parameters of all ranks, by their names in a `LanguageModel`, in the model's order.

        Args:
            own: this rank's parameters.
        """
        layout = next(iter(own.values())).layout
        whole = {f"transformer.{name}": parameter for name, parameter in self.whole.items()}
        return {n: own[n] if n in own else self._absent(n, x.dtype, layout) for n, x in whole.items()}

    def numbered(self, optim: Optim) -> list[list[str]]:
        """The names of the parameters in each of an optimizer's groups, in the order of a single process."""
        trained = [(name, parameter) for name, parameter in self.whole.items() if parameter.requires_grad]
        names = {id(parameter): f"transformer.{name}" for name, parameter in trained}
        groups = optim.numbered(trained, self.fused)
        return [[names[id(parameter)] for parameter in group["params"]] for group in groups]

    def complete_state(
        self, state: Mapping[str, Any], own: Sequence[str], optim: Optim, layout: Layout
    ) -> dict[str, Any]:
        """An optimizer's state for all parameters, numbered as by a single process; all ranks call it together.

        Args:
            state: the state of this rank's parameters; tensors of a parameter's shape are `ShardedTensor`.
            own: the names of these parameters, in the order of their numbers.
        """
        groups, kept = self.numbered(optim), {name: state["state"][n] for n, name in enumerate(own) if state["state"]}
        names = [name for group in groups for name in group]
        of_ranks: list[Any] = [None] * self.ranks
        described = {name: {key: _described(x) for key, x in values.items()} for name, values in kept.items()}
        dist.all_gather_object(of_ranks, described, group=self.group)
        everywhere = {name: values for rank in reversed(of_ranks) for name, values in rank.items()}
        numbers = iter(range(len(names)))

        def of_parameter(name: str) -> dict[str, Any]:
            if name in kept:
                return kept[name]
            return {key: self._absent(name, x, layout) for key, x in everywhere[name].items()}

        return {
            "state": {number: of_parameter(name) for number, name in enumerate(names) if name in everywhere},
            "param_groups": [
                group | {"params": [next(numbers) for _ in names_]}
                for group, names_ in zip(state["param_groups"], groups, strict=True)
            ],
        }

    def own_state(self, saved: Mapping[str, Any], own: Sequence[str], optim: Optim) -> dict[str, Any]:
        """The reverse of `complete_state`: this rank's part of a saved state."""
        names = [name for group in self.numbered(optim) for name in group]
        numbers = {name: number for number, name in enumerate(names)}
        here, counted = set(own), iter(range(len(own)))
        return {
            "state": {n: saved["state"][numbers[name]] for n, name in enumerate(own) if saved["state"]},
            "param_groups": [
                group | {"params": [next(counted) for number in group["params"] if names[number] in here]}
                for group in saved["param_groups"]
            ],
        }

    def _absent(self, name: str, described: Any, layout: Layout) -> Any:
        """What stands for another rank's tensor, of which `_described` gave this."""
        if not isinstance(described, torch.dtype):
            return described
        shape = self.whole[name.removeprefix("transformer.")].shape
        return ShardedTensor(name, torch.empty(shape, dtype=described, device="meta"), layout, self.holder(name))


def _described(value: Any) -> Any:
    """What other ranks have to know of a value: the dtype of a tensor like a parameter, otherwise the value."""
    if isinstance(value, ShardedTensor):
        return value.dtype
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def refuse_pipeline(
    config: TransformerConfig,
    ranks: int,
    stages_per_rank: int,
    micro_batches: int | None,
    schedule: Schedule = "1F1B",
) -> list[Problem]:
    """The reasons why a model, or this number of micro-batches in a step, cannot use a pipeline.

    Args:
        micro_batches: None if their number is not known.
    """
    if ranks == 1:
        given = (("pipeline_stages_per_rank", stages_per_rank, 1), ("pipeline_schedule", schedule, "1F1B"))
        return [Problem(name, value, "there is no pipeline", (only,)) for name, value, only in given if value != only]
    if schedule in FOLDED and stages_per_rank != 2:
        message = f"pipeline_schedule={schedule!r} is for 2 stages on each rank"
        return [Problem("pipeline_stages_per_rank", stages_per_rank, message, (2,))]
    problems = []
    if schedule in FOLDED and config.share_embeddings_and_output_weights:
        message = (
            "puts the first and the last stage on one rank, which cannot gather tied embeddings for both; set "
            "model.config.share_embeddings_and_output_weights=False, or another schedule"
        )
        problems.append(Problem("pipeline_schedule", schedule, message, ("1F1B", "InterleavedZeroBubble")))
    stages = "" if stages_per_rank == 1 else f"with pipeline_stages_per_rank={stages_per_rank}: "
    messages = []
    try:
        refuse_stages(config, ranks * stages_per_rank)
    except ConfigError as error:
        messages += error.under("model.config").problems
    if micro_batches is not None:
        wanted = _wanted_micro_batches(ranks, stages_per_rank, micro_batches, schedule)
        if wanted:
            messages.append(
                f"a step has {micro_batches} micro-batches on each data-parallel rank, and needs {wanted}; change "
                "data.micro_batch_size or data.global_batch_size"
            )
    return problems + [Problem("pipeline_parallel", ranks, f"{stages}{message}") for message in messages]


def _wanted_micro_batches(ranks: int, stages_per_rank: int, micro_batches: int, schedule: Schedule) -> str:
    """How many micro-batches a step must have, if it has not; "" if it has."""
    least = ranks * stages_per_rank if schedule in FOLDED else ranks
    if micro_batches < least:
        return f"{least} or more"
    in_rounds = schedule == "InterleavedZeroBubble" or (schedule == "1F1B" and stages_per_rank > 1)
    return f"a multiple of {ranks}" if in_rounds and micro_batches % ranks else ""


def refuse_zero_bubble(schedule: Schedule, settings: Mapping[str, Any]) -> list[Problem]:
    """Why a schedule cannot compute the gradients of weights by themselves.

    Args:
        settings: what a run sets, by the names of fields; of those in `_WHOLE`, any but these are refused.
    """
    if schedule == "1F1B":
        return []
    return [
        Problem(name, settings[name], f"{why}; set {off} here, or trainer.strategy.pipeline_schedule='1F1B'")
        for name, (off, why) in _WHOLE.items()
        if settings[name] != off
    ]


_WHOLE: dict[str, tuple[Any, str]] = {
    "model.compile": (None, "a compiled layer computes all of its gradients at once"),
    "model.activation_checkpointing": (None, "a layer would be computed again for the gradient of each weight"),
    "model.fp8": (None, "a product in float8 computes both of its gradients at once"),
    "model.tiled_mlp": (None, "a tile computes all of its gradients at once"),
    "model.tiled_attention": (None, "attention in tiles computes all of its gradients at once"),
    "trainer.strategy.tensor_parallel": (1, "a split product computes both of its gradients at once"),
}
"""What cannot be computed in two parts, by field: the value that is allowed, and why others are not."""
