"""The memory and the speed of a training, from its parts: what `memory` and `speed` are asked."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from fiddlehead.models import Transformer
from fiddlehead.plan.activations import Setting
from fiddlehead.plan.cards import Card
from fiddlehead.plan.memory import Held, Memory, memory
from fiddlehead.plan.speed import Speed, speed
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.frozen import halves_frozen
from fiddlehead.training.optim import Optim


def memory_and_speed(
    model: LanguageModel,
    transformer: Transformer,
    data: Any,
    trainer: Trainer,
    optim: Optim,
    sizes: Sizes,
    card: Card | None,
) -> tuple[Memory | None, Speed | None]:
    """The memory of the GPU that has the most, and how fast such cards train; None for what is not worked out.

    Neither is where preferences are learned, and the speed is not if the card is not known.

    Args:
        transformer: the complete model, on the meta device.
        sizes: of the ranks.
    """
    if isinstance(model, PreferenceModel):
        return None, None
    held = held_of(model, transformer, trainer, optim, sizes)
    setting = setting_of(model, data, trainer, sizes)
    gpus, gpus_per_node = trainer.num_devices * trainer.num_nodes, trainer.num_devices
    known = (transformer.config, held, setting)
    fast = card and speed(*known, card, data.seq_length, gpus=gpus, gpus_per_node=gpus_per_node)
    return memory(*known), fast


def held_of(model: LanguageModel, transformer: Transformer, trainer: Trainer, optim: Optim, sizes: Sizes) -> Held:
    """What the rank has of the parameters that has the most of them."""
    learned = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    precision = str(trainer.precision)
    each = 2 if precision == "bf16-true" else 4
    number = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for _, parameter in learned)
    frozen = (number - trained) * (2 if halves_frozen(model, trainer) else each)
    share = sizes.held(transformer) / number
    copied = isinstance(trainer.strategy, DDPStrategy) and trainer.num_devices * trainer.num_nodes > 1
    return Held(
        parameters=share * (frozen + each * trained),
        gradients=share * each * trained,
        optimizer=share * optim.state_bytes(learned, precision),
        stepping=optim.step_bytes(learned, precision),
        buckets=each * trained if copied else 0.0,
    )


def setting_of(model: LanguageModel, data: Any, trainer: Trainer, sizes: Sizes) -> Setting:
    """How the ranks train."""
    strategy = trainer.strategy
    cut = isinstance(strategy, Parallel) and trainer.num_devices * trainer.num_nodes > 1
    return Setting(
        tokens=data.micro_batch_size * data.seq_length,
        precision=str(trainer.precision),
        compiled=model.compile_mode is not None,
        recompute=model.recompute,
        fp8=model.fp8 is not None,
        micro_batches=data.accumulate_grad_batches(sizes.data),
        adapters=model.lora is not None,
        sizes=sizes if cut else None,
        reshard_after_forward=not isinstance(strategy, Parallel) or strategy.reshard_after_forward,
    )
