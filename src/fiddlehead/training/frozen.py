"""Holds the frozen weights below adapters in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from fiddlehead.training.distributed.parallel import Parallel


def halves_frozen(model: LightningModule, trainer: Any) -> bool:
    """Whether a run can use `FrozenBFloat16`: adapters in mixed precision, on unsharded weights.

    Args:
        trainer: a trainer, or another object with its strategy, precision, and numbers of devices and nodes.
    """
    # What is cut over several devices is float32 in parts, and bfloat16 where it is gathered.
    cut = isinstance(trainer.strategy, Parallel) and trainer.num_devices * trainer.num_nodes > 1
    return getattr(model, "lora", None) is not None and str(trainer.precision) == "bf16-mixed" and not cut


def halve_frozen(model: LightningModule, trainer: Trainer) -> None:
    """Makes the frozen weights of a starting run in bfloat16, if `halves_frozen`."""
    if halves_frozen(model, trainer):
        trainer.strategy.precision_plugin = FrozenBFloat16("bf16-mixed", trainer.strategy.root_device.type)


class FrozenBFloat16(MixedPrecision):
    """Mixed precision that makes the base model's weights in bfloat16, because they are not trained.

    Autocast would convert them to bfloat16 for each product and keep both copies. The adapters stay float32.
    """

    @contextmanager
    def module_init_context(self) -> Iterator[None]:  # type: ignore[override]
        """In the block, new parameters are bfloat16, except those that ask for float32."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
