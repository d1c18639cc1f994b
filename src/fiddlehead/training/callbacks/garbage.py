"""Keeps Python's garbage collector out of the training steps."""

from __future__ import annotations

import gc
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.training.callbacks.checkpoint import at_step_end


class CollectGarbage(Callback):
    """Collects garbage after every n-th step, on all ranks after the same step, and at no other time.

    By default, Python collects in the middle of a step when enough objects were made, on each rank in another step, and
    all ranks wait for the one that collects. Objects that exist when training begins are never examined again.
    torchtitan does the same (https://github.com/pytorch/torchtitan, tools/utils.py).

    If the program has switched the collector off itself, this does nothing.

    Args:
        every_n_steps: how often to examine new objects. All objects made since training began are examined after a
            validation, which is not part of a step.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._collects = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects once, and switches Python's own collections off."""
        if gc.isenabled():
            self._collects = True
            gc.disable()
            gc.collect()
            gc.freeze()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the youngest generation after every n-th step."""
        if self._collects and at_step_end(trainer) and trainer.global_step % self.every_n_steps == 0:
            gc.collect(1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects the older generations."""
        if self._collects:
            gc.collect()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switches them on again."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Switches them on again."""
        self._restore()

    def _restore(self) -> None:
        if self._collects:
            self._collects = False
            gc.unfreeze()
            gc.enable()
