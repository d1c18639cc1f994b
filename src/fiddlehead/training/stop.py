"""Stopping a run from outside: the step in hand is finished and saved first."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead import signals
from fiddlehead.errors import StopRequested
from fiddlehead.runs import RunDirectory, StopRequest
from fiddlehead.training.checkpoint import Checkpoint, at_step_end


class StopOnRequest(Callback):
    """Ends a run after the step at which its stop file is found; the step is saved.

    The first rank looks, and all ranks stop after the same step. Signals become the stop file (`fiddlehead.signals`).
    """

    def __init__(self, checkpoint: Checkpoint, run: RunDirectory) -> None:
        self.checkpoint, self.run = checkpoint, run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over, also from Lightning, whose handlers communicate, and so may hang, or requeue."""
        signals.stop_after_step(self.run)
        self._stop_if_asked(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops every rank after the same step."""
        if at_step_end(trainer):
            self._stop_if_asked(trainer, pl_module)

    def _stop_if_asked(self, trainer: Trainer, module: LightningModule) -> None:
        request = self.run.stop_request() if trainer.is_global_zero else None
        if trainer.world_size > 1:
            request = _agree(request, module.device)
        if request is None:
            return
        self.checkpoint.save(trainer)
        self.checkpoint.io.wait()
        if trainer.world_size == 1:
            self.run.clear_stop_request()  # with several processes, the one that started them still has to see it
        step = trainer.global_step
        when = f"after step {step}, which is saved" if step else "before the first step"
        raise StopRequested(f"stopped {when}: {request.reason}", requeue=request.requeue)


def _agree(request: StopRequest | None, device: torch.device) -> StopRequest | None:
    """What the first rank was asked, on every rank."""
    answer = torch.tensor(0 if request is None else 2 if request.requeue else 1, device=device)
    torch.distributed.broadcast(answer, src=0)
    code = int(answer)
    return request or (StopRequest("as the first rank was asked to", requeue=code == 2) if code else None)
