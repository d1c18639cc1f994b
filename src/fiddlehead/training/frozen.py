"""What adapters change, held as the products with it are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from fiddlehead.training.distributed.parallel import Parallel


def halves_frozen(model: LightningModule, trainer: Trainer) -> bool:
    """Whether `FrozenBFloat16` serves a run: adapters in mixed precision, on whole weights."""
    # What is cut over several devices is float32 in parts, and bfloat16 where it is gathered.
    cut = isinstance(trainer.strategy, Parallel) and trainer.num_devices * trainer.num_nodes > 1
    return getattr(model, "lora", None) is not None and str(trainer.precision) == "bf16-mixed" and not cut


def halve_frozen(model: LightningModule, trainer: Trainer) -> None:
    """Lets a run that is about to begin make its frozen weights in bfloat16, if `halves_frozen`."""
    if halves_frozen(model, trainer):
        trainer.strategy.precision_plugin = FrozenBFloat16("bf16-mixed", trainer.strategy.root_device.type)


class FrozenBFloat16(MixedPrecision):
    """Mixed precision in which the weights to begin with are made in bfloat16, as none of them is to learn.

    Autocast would turn them into bfloat16 for each product, and keep both. The adapters are float32 all the same.
    """

    @contextmanager
    def module_init_context(self) -> Iterator[None]:  # type: ignore[override]
        """In the block new parameters are bfloat16, but for those that ask for float32."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
