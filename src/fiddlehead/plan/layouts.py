"""The layouts with which a number of GPUs can train a recipe, fastest first: what `--fit` searches.

A layout is the micro-batch, what is computed again, and over how many ranks samples, layers, sequences and experts are
split; and, for long sequences, whether the feed-forward has tiles. The global batch and the objective stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fiddlehead.errors import ConfigError
from fiddlehead.models.speed import Recompute
from fiddlehead.plan import attention
from fiddlehead.plan.attention_calls import calls_of
from fiddlehead.plan.cards import Card
from fiddlehead.plan.memory import Memory
from fiddlehead.plan.rank_memory import OFFLOADED, Training
from fiddlehead.plan.speed import Speed
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from fiddlehead.training.distributed.sizes import Sizes

AXES = (
    "tensor_parallel",
    "context_parallel",
    "pipeline_parallel",
    "pipeline_stages_per_rank",
    "expert_parallel",
    "data_parallel_replicate",
    "reshard_after_forward",
)
"""The fields of `Parallel` that are searched; what they leave of the GPUs has different samples and shards."""
MOST_STAGES = 4
"""Of a rank of a pipeline."""
MOST_SEQUENCES = 32
"""In a micro-batch."""
RECOMPUTED: tuple[Recompute | None, ...] = (None, 0.9, 0.5, "selective", "full")
"""What is tried. Of numbers only these were compared with what the compiler keeps."""
TILE = 8192
"""Tokens of a tile of the feed-forward, where a sequence has more than two of them."""
INPUTS_OFFLOADED = "model.activation_offloading=true"
Way = tuple[list[str], Training]
"""The edits of a recipe, and the training that they make."""


@dataclass(frozen=True)
class Layout:
    """One way to train on the GPUs, and what it takes."""

    edits: tuple[str, ...]
    """The edits of the recipe that choose it; none if it is the recipe's."""
    micro_batch_size: int
    activation_checkpointing: Recompute | None
    sizes: Sizes
    memory: Memory
    speed: Speed | None
    """None where it is not worked out."""

    def to_dict(self) -> dict[str, Any]:
        """The edits, the memory and the speed, as JSON values."""
        speed = None if self.speed is None else self.speed.to_dict()
        return {"edits": list(self.edits), "memory": self.memory.to_dict(), "speed": speed}


def layouts(training: Training, card: Card) -> list[Layout]:
    """All layouts that fit with 5 % of the memory to spare, fastest first; none where memory or speed is not known.

    If none fits, those with the optimizer's state in main memory; then, for long sequences, with the layers' inputs
    there and the feed-forward in tiles, and then with attention in tiles too. Layouts that the model, the optimizer,
    the strategy or the attention kernels would refuse are left out.
    """
    for tries in _ways(training):
        found = [
            (each.speed.step, len(edits) + len(each.edits), replace(each, edits=(*edits, *each.edits)))
            for edits, changed in tries
            for each in fitting(changed, card)
            if each.speed is not None
        ]
        if found:
            return [each for *_, each in sorted(found, key=lambda ranked: ranked[:2])]
    return []


def fitting(training: Training, card: Card, *, most_edits: int = 100) -> Iterator[Layout]:
    """The layouts that fit with 5 % of the memory to spare, in no order; their speed may not be known.

    Args:
        most_edits: leave out those that need more edits.
    """
    strategies = [training.devices.strategy]
    if training.devices.gpus > 1 and not isinstance(strategies[0], Parallel):
        strategies.append(Parallel())
    for strategy in strategies:
        yield from _Search(training, strategy, card, most_edits).fitting()


def _ways(training: Training) -> Iterator[list[Way]]:
    """A training with ever less on the GPU; of each, those of about the same speed."""
    offloaded = training.offloaded()
    states: list[Way] = [([], training), *([] if offloaded is None else [([OFFLOADED], offloaded)])]
    for edits, with_state in states:
        yield [(edits, with_state), *(([*edits, *tiled], changed) for tiled, changed in _in_tiles(with_state))]
    least = [
        ([*edits, *tiled, INPUTS_OFFLOADED], computing(changed, activation_offloading=True))
        for edits, with_state in states
        for tiled, changed in _in_tiles(with_state)
        if not changed.model.computation.activation_offloading
    ]
    yield least
    if training.model.computation.tiled_attention is None:
        for groups in head_tiles(training):
            tiles = f"model.tiled_attention={groups}"
            yield [([*edits, tiles], computing(changed, tiled_attention=groups)) for edits, changed in least]


def _in_tiles(training: Training) -> Iterator[Way]:
    """A training of long sequences with the feed-forward in tiles."""
    model = training.model
    long = training.data.seq_length > 2 * TILE
    if long and not isinstance(model, PreferenceModel) and model.computation.tiled_mlp is None:
        yield [f"model.tiled_mlp={TILE}"], computing(training, tiled_mlp=TILE)


def head_tiles(training: Training) -> list[int]:
    """The numbers of key/value heads that are tried for a tile of attention."""
    groups = training.transformer.config.groups
    return [number for number in (groups // 2, 1) if 0 < number < groups and groups % number == 0]


def computing(training: Training, **changes: Any) -> Training:
    """A training with changes of its model's `Computation`."""
    return replace(training, model=computed(training.model, **changes))


class _Search:
    """The layouts with one kind of strategy.

    Args:
        now: the training as its recipe has it.
        strategy: of this kind; if it is `Parallel`, with other sizes too.
    """

    def __init__(self, now: Training, strategy: Any, card: Card, most_edits: int) -> None:
        self.now, self.card, self.most_edits = now, card, most_edits
        self.training = replace(now, devices=replace(now.devices, strategy=strategy))
        self.config, self.devices = now.transformer.config, self.training.devices
        modes = (now.model.computation.compile, "layers", None)
        self.models = {mode: computed(now.model, compile=mode, activation_checkpointing=None) for mode in modes}
        self.served = cache(self._served)

    def fitting(self) -> Iterator[Layout]:
        """Those that fit."""
        data = self.now.data
        for strategy in self._strategies():
            sizes = self._sizes(strategy)
            per_rank, rest = divmod(data.global_batch_size, sizes.data)
            edits = self._edits(strategy, sizes)
            ring = strategy.ring_size(self.config) if isinstance(strategy, Parallel) else 1
            if rest or len(edits) > self.most_edits or not self.served(sizes.tensor, sizes.context, ring):
                continue
            model = self.models[self._compile(sizes)]
            tried = replace(self.training, model=model)
            held, setting = self.training.held(sizes), tried.setting(sizes, per_rank)
            reshards = getattr(strategy, "reshard_after_forward", True)
            setting = replace(setting, reshard_after_forward=reshards, ring=ring)
            recomputed = list(self._recomputed(model, sizes))
            for micro in _divisors(per_rank, MOST_SEQUENCES):
                if sizes.pipeline > 1 and strategy.problems(self.config, data.seq_length, per_rank // micro):
                    continue
                for recompute in recomputed:
                    chosen = (*self._of_batch(micro, recompute), *edits)
                    if len(chosen) > self.most_edits:
                        continue
                    like = {"tokens": micro * data.seq_length, "sequences": micro, "micro_batches": per_rank // micro}
                    at = replace(setting, recompute=recompute, **like)
                    needed = tried.memory(held, at)
                    if needed.fits(self.card.gib) == "fits":
                        yield Layout(chosen, micro, recompute, sizes, needed, tried.speed(held, at, self.card))

    def _strategies(self) -> Iterator[Any]:
        """The strategies that the parts allow."""
        now = self.devices.strategy
        if not isinstance(now, Parallel):
            if not self._problems(now):
                yield now
            return
        grown = [Parallel(context_parallel_method=now.context_parallel_method)]
        if self._problems(grown[0]):
            return
        for axis in AXES:  # what is refused along the first axes is not tried along the others
            wider = []
            for each in grown:
                for number in self._numbers(axis, each):
                    strategy = copy.copy(each)
                    setattr(strategy, axis, number)
                    if number in (1, False) or not self._problems(strategy):
                        wider.append(strategy)
            grown = wider
        yield from grown

    def _numbers(self, axis: str, strategy: Parallel) -> list[int]:
        """The values to try of an axis, given those of the axes before it."""
        sizes, node = strategy.sizes(self.devices.gpus), self.devices.num_devices
        if axis == "tensor_parallel":  # it stays within a node
            return _divisors(node)
        if axis == "pipeline_stages_per_rank":
            return _divisors(self.config.num_layers // sizes.pipeline, MOST_STAGES) if sizes.pipeline > 1 else [1]
        if axis == "expert_parallel":
            return _divisors(sizes.data) if self.config.num_moe_experts is not None else [1]
        if axis == "data_parallel_replicate":  # of the recipe, or such that each replica has a node
            shares = sizes.data * sizes.context * sizes.tensor
            others = {getattr(self.now.devices.strategy, axis, 1), shares // node if shares % node == 0 else 1}
            return [1, *sorted(each for each in others if each > 1 and sizes.data // sizes.expert % each == 0)]
        if axis == "reshard_after_forward":
            present = getattr(self.now.devices.strategy, axis, True)
            return [present] if sizes.data // sizes.replicate * sizes.context == 1 else [True, False]
        return _divisors(sizes.data)

    def _sizes(self, strategy: Any) -> Sizes:
        return replace(self.devices, strategy=strategy).sizes

    def _problems(self, strategy: Any) -> bool:
        """Whether the strategy, the model or the optimizer refuses it."""
        sizes, precision = self._sizes(strategy), self.devices.precision
        if isinstance(strategy, Parallel) and strategy.problems(self.config, self.now.data.seq_length):
            return True
        split = sizes if self.devices.cut else None
        refused = self.models[self._compile(sizes)].problems(precision, sizes)
        return bool(refused + self.now.optim.problems(precision, split, adapters=self.now.model.lora is not None))

    def _compile(self, sizes: Sizes) -> Any:
        """What is compiled: no mixture with split experts; by layers what is cut or has tiles."""
        mode = self.now.model.computation.compile
        if sizes.expert > 1:
            return None
        by_layers = self.devices.cut or self.now.model.computation.tiled_mlp is not None
        return "layers" if by_layers and mode == "model" else mode

    def _served(self, tensor: int, context: int, ring: int) -> bool:
        """Whether kernels serve the heads of such ranks."""
        now = self.now
        transformer = now.transformer
        calls = calls_of(now.model, self.config, now.data, self.devices.precision, None, transformer=transformer)
        calls = replace(calls, tensor=tensor, context=context, ring=ring)
        try:
            if self.card.target is None:
                attention.refuse_impossible(calls)
            else:
                attention.choose(calls, self.card.target)
        except ConfigError:
            return False
        return True

    def _recomputed(self, model: LanguageModel, sizes: Sizes) -> Iterator[Recompute | None]:
        """What may be computed again. A number is not worked out where layers or sequences are split."""
        present = self.now.model.computation.activation_checkpointing
        if isinstance(model, PreferenceModel):  # it has no such field
            yield present
            return
        for recompute in dict.fromkeys((*RECOMPUTED, present)):
            if isinstance(recompute, int | float) and sizes.tensor * sizes.context > 1 and recompute != present:
                continue
            changed = computed(model, activation_checkpointing=recompute)
            if not changed.computation.problems() + changed.problems(self.devices.precision, sizes):
                yield recompute

    def _of_batch(self, micro_batch_size: int, recompute: Recompute | None) -> list[str]:
        """The edits that choose these."""
        edits = []
        if micro_batch_size != self.now.data.micro_batch_size:
            edits.append(f"data.micro_batch_size={micro_batch_size}")
        if recompute != self.now.model.computation.activation_checkpointing:
            edits.append(f"model.activation_checkpointing={recompute}")
        return edits

    def _edits(self, strategy: Any, sizes: Sizes) -> list[str]:
        """The edits that choose a strategy, and what is compiled with it."""
        edits, now = [], self.now.devices.strategy
        if (mode := self._compile(sizes)) != self.now.model.computation.compile:
            edits.append(f"model.compile={mode}")
        if not isinstance(strategy, Parallel):
            return edits
        if not isinstance(now, Parallel):
            fields = (f"{axis}={getattr(strategy, axis)}" for axis in AXES if _differ(strategy, Parallel(), axis))
            return [*edits, f"trainer.strategy=Parallel({', '.join(fields)})"]
        if now.data_parallel not in (None, sizes.data):
            edits.append("trainer.strategy.data_parallel=None")
        changed = [axis for axis in AXES if _differ(strategy, now, axis)]
        return edits + [f"trainer.strategy.{axis}={getattr(strategy, axis)}" for axis in changed]


def computed(model: LanguageModel, **changes: Any) -> LanguageModel:
    """A copy of a model, without values, with changes of its `Computation`."""
    changed = copy.copy(model)
    changed.computation = replace(model.computation, **changes)
    return changed


def _differ(one: Parallel, other: Parallel, axis: str) -> bool:
    return getattr(one, axis) != getattr(other, axis)


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [each for each in range(1, min(number, most or number) + 1) if number % each == 0]
