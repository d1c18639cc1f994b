"""When the gradients of the layers' weights stay bfloat16 until the optimizer reads them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy

from fiddlehead.training.distributed.parallel import Parallel


def keeps_bfloat16_gradients(
    model: Any, optimizer: Any, *, precision: str, strategy: Any, devices: int, micro_batches: int
) -> bool:
    """Whether a step leaves bfloat16 gradients, which `fiddlehead.models.bfloat16_weights` makes.

    The values are the same as in float32, since products are bfloat16. Gradients that are added up, over micro-batches,
    tiles or ranks, are float32. Layers that are computed again cast their weights again, and keep no copies of them.

    Args:
        model: the `LanguageModel`.
        optimizer: the optimizer, or its settings.
        devices: of all nodes.
        micro_batches: of a step.
    """
    how = model.computation
    return (
        precision == "bf16-mixed"
        and devices == micro_batches == 1
        and isinstance(strategy, SingleDeviceStrategy | Parallel)
        and model.lora is None
        and how.activation_checkpointing is how.fp8 is how.tiled_mlp is how.tiled_attention is None
        and getattr(optimizer, "takes_bfloat16_gradients", False)
    )
