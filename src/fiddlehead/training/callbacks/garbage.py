"""Python's garbage collector, kept out of the steps."""

from __future__ import annotations

import gc
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.training.callbacks.checkpoint import at_step_end


class CollectGarbage(Callback):
    """Collects garbage after every so many steps, on all ranks after the same one, and at no other time.

    Python would do it when enough objects were made, in the middle of a step, and each rank in another: all wait for
    the one that does. What there is when training begins is not looked at again. As torchtitan does it
    (https://github.com/pytorch/torchtitan, tools/utils.py).

    Where a program has switched the collector off itself, this does nothing.

    Args:
        every_n_steps: how often to look at what was made since the last time. All that was made since training began is
            looked at after a validation, which is not part of a step.
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
        """Collects what is young, when it is time."""
        if self._collects and at_step_end(trainer) and trainer.global_step % self.every_n_steps == 0:
            gc.collect(1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects what has lived longer."""
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
