"""Stopping a run from outside: the step in hand is finished and saved first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.errors import StopRequested
from fiddlehead.training.checkpoint import Checkpoint, at_step_end

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(Callback):
    """Ends the run after the current step on SIGTERM or SIGINT; a second signal ends it at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.received = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over, also from Lightning, whose handler communicates and so may hang."""
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise StopRequested(signum, "at once, on a second signal; the checkpoints before it are whole")
        self.received = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops every rank after the same step."""
        if not at_step_end(trainer):
            return
        received = self.received
        if trainer.world_size > 1:
            agreed = torch.tensor(received, device=pl_module.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            received = int(agreed)
        if received:
            self.checkpoint.save(trainer)
            raise StopRequested(received, f"after step {trainer.global_step}, which is saved")
