"""When a backward pass leaves the gradients of the layers' weights in bfloat16, as their products give them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy

from fiddlehead.training.distributed.parallel import Parallel


def makes_bfloat16_gradients(model: Any, optimizer: Any, *, precision: str, strategy: Any, devices: int) -> bool:
    """Whether the backward pass of a micro-batch makes bfloat16 gradients, by `fiddlehead.models.bfloat16_weights`.

    The values are the same as in float32, since products are bfloat16. Sums over micro-batches are float32, and so are
    gradients that are sums over tiles or ranks. Layers that are computed again cast their weights again, and keep no
    copies of them.

    Args:
        model: the `LanguageModel`.
        optimizer: the optimizer, or its settings.
        devices: of all nodes.
    """
    how = model.computation
    return (
        precision == "bf16-mixed"
        and devices == 1
        and isinstance(strategy, SingleDeviceStrategy | Parallel)
        and model.lora is None
        and how.activation_checkpointing is how.fp8 is how.tiled_mlp is how.tiled_attention is None
        and getattr(optimizer, "takes_bfloat16_gradients", False)
    )
