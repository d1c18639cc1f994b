"""Holds the frozen weights below adapters in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from fiddlehead.training.distributed.parallel import Parallel


def halves_frozen(model: LightningModule, precision: str, *, fsdp: bool) -> bool:
    """Whether a run can use `FrozenBFloat16`: adapters in mixed precision.

    Args:
        fsdp: whether FSDP2 has the weights: they are then float32 in parts, and bfloat16 where they are gathered.
    """
    return getattr(model, "lora", None) is not None and precision == "bf16-mixed" and not fsdp


def halve_frozen(model: LightningModule, trainer: Trainer) -> None:
    """Makes the frozen weights of a starting run in bfloat16, if `halves_frozen`."""
    strategy = trainer.strategy
    fsdp = isinstance(strategy, Parallel) and strategy.sizes(trainer.num_devices * trainer.num_nodes).fsdp
    if halves_frozen(model, str(trainer.precision), fsdp=fsdp):
        strategy.precision_plugin = FrozenBFloat16("bf16-mixed", strategy.root_device.type)


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
