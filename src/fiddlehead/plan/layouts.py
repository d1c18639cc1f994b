"""The layouts with which a number of GPUs can train a recipe, fastest first: what `fiddlehead plan --fit` searches.

A layout is the micro-batch, what is computed again, and over how many ranks layers and sequences are split. The global
batch and the objective stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from fiddlehead.models import Transformer
from fiddlehead.models.speed import Recompute
from fiddlehead.plan.cards import Card
from fiddlehead.plan.memory import Memory, memory
from fiddlehead.plan.rank_memory import held_of, setting_of
from fiddlehead.plan.speed import Speed, speed
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.optim import Optim

SPLITS = (1, 2, 4, 8, 16, 32)
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Layout:
    """One way to train on the GPUs, and what it takes."""

    micro_batch_size: int
    activation_checkpointing: Recompute | None
    tensor_parallel: int
    context_parallel: int
    memory: Memory
    speed: Speed
    split: bool = True
    """Whether the strategy can split layers and sequences over ranks."""

    @property
    def edits(self) -> list[str]:
        """The edits of a recipe that choose it."""
        edits = [
            f"data.micro_batch_size={self.micro_batch_size}",
            f"model.activation_checkpointing={self.activation_checkpointing}",
        ]
        if self.split:  # also where it is 1: the recipe may have another
            edits += [f"trainer.strategy.{n}={getattr(self, n)}" for n in ("tensor_parallel", "context_parallel")]
        return edits


def layouts(
    model: LanguageModel, transformer: Transformer, data: Any, trainer: Trainer, optim: Optim, card: Card
) -> list[Layout]:
    """All layouts that fit with 5 % of the memory to spare, fastest first; none where memory or speed is not known.

    Those that the model, the optimizer or the strategy would refuse are left out.

    Args:
        transformer: the complete model, on the meta device.
        trainer: says how many GPUs there are.
    """
    if isinstance(model, PreferenceModel):
        return []
    found = []
    gpus = trainer.num_devices * trainer.num_nodes
    now = trainer.strategy.sizes(gpus) if isinstance(trainer.strategy, Parallel) else Sizes(gpus, gpus)
    setting = setting_of(model, data, trainer, now)
    for sizes in _splits(model, transformer, data, trainer, optim):
        held = held_of(model, transformer, trainer, optim, sizes)
        for micro in MICRO_BATCHES:
            if data.global_batch_size % (micro * sizes.data):
                continue
            for recompute in _recomputed(model, transformer):
                tried = dataclasses.replace(
                    setting,
                    tokens=micro * data.seq_length,
                    recompute=recompute,
                    sizes=setting.sizes and sizes,
                    micro_batches=data.global_batch_size // (micro * sizes.data),
                )
                needed = memory(transformer.config, held, tried)
                if needed.fits(card.gib) != "fits":
                    continue
                fast = speed(
                    transformer.config,
                    held,
                    tried,
                    card,
                    data.seq_length,
                    gpus=gpus,
                    gpus_per_node=trainer.num_devices,
                )
                if fast is not None:
                    split = setting.sizes is not None
                    found.append(Layout(micro, recompute, sizes.tensor, sizes.context, needed, fast, split))
    return sorted(found, key=lambda layout: layout.speed.step)


def _splits(
    model: LanguageModel, transformer: Transformer, data: Any, trainer: Trainer, optim: Optim
) -> Iterator[Sizes]:
    """The ways to share layers and sequences that the parts allow; tensor parallelism stays within a node."""
    gpus, now = trainer.num_devices * trainer.num_nodes, trainer.strategy
    if not isinstance(now, Parallel) or gpus == 1:
        yield Sizes(gpus, gpus)
        return
    if now.pipeline_parallel > 1 or now.expert_parallel > 1 or now.data_parallel_replicate > 1:
        yield now.sizes(gpus)  # those are not searched, and stay with what they were chosen for
        return
    precision = str(trainer.precision)
    for tensor in SPLITS:
        for context in SPLITS:
            if tensor > trainer.num_devices or gpus % (tensor * context):
                continue
            strategy = Parallel(tensor_parallel=tensor, context_parallel=context)
            sizes = strategy.sizes(gpus)
            problems = strategy.problems(transformer.config, data.seq_length) + model.problems(precision, sizes)
            if not problems + optim.problems(precision, sizes, adapters=model.lora is not None):
                yield sizes


def _recomputed(model: LanguageModel, transformer: Transformer) -> tuple[Recompute | None, ...]:
    """What may be computed again; `LanguageModel.problems` says why a balancing loss wants a part to keep."""
    if model.compile_mode is not None and transformer.config.moe_aux_loss_coeff:
        return None, 0.5
    return None, "selective", "full"
