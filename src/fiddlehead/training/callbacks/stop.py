"""Stops a run on request, after its current step is finished and saved; and saves steps by the clock."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.errors import StopRequested
from fiddlehead.run import signals
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import StopRequest
from fiddlehead.training.callbacks.checkpoint import Checkpoint, at_step_end

_DUE = 4
"""What is added to the code of a request where a checkpoint is due."""


class StopOnRequest(Callback):
    """Ends a run after the step in which its stop file is found, and saves the step.

    The first rank looks for the file, and at the clock for `checkpoint.every_n_minutes`, and tells the others, so all
    ranks stop after the same step and save the same steps. It sends this over the CPU's network while the optimizer's
    step is queued, so no device waits. Signals create the stop file (`fiddlehead.run.signals`).
    """

    def __init__(self, checkpoint: Checkpoint, run: RunDirectory) -> None:
        self.checkpoint, self.run = checkpoint, run
        self._ranks: Any = None
        self._answer = torch.zeros((), dtype=torch.int64)
        self._told: Any = None
        self._request: StopRequest | None = None
        self._due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals, also from Lightning, whose handlers communicate (so they may hang) or requeue."""
        signals.stop_after_step(self.run)
        if trainer.world_size > 1:
            self._ranks = torch.distributed.new_group(backend="gloo")
            # Lightning asks after signals of its own, and waits for the device to answer, in each micro-batch.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._tell(trainer)
        self._stop_if_asked(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Looks for the stop file, and begins to tell the other ranks."""
        self._tell(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops every rank after the same step."""
        if at_step_end(trainer):
            self._stop_if_asked(trainer)

    def _tell(self, trainer: Trainer) -> None:
        self._request = self.run.stop_request() if trainer.is_global_zero else None
        self._due = trainer.is_global_zero and self.checkpoint.is_due()
        if self._ranks is not None:
            code = 0 if self._request is None else 2 if self._request.requeue else 1
            self._answer.fill_(code + _DUE * self._due)
            self._told = torch.distributed.broadcast(self._answer, src=0, group=self._ranks, async_op=True)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        request = self._request
        if self._told is not None:
            self._told.wait()
            self._due, code = int(self._answer) >= _DUE, int(self._answer) % _DUE
            request = request or (StopRequest("as the first rank was asked to", requeue=code == 2) if code else None)
        if request is None:
            if self._due:
                self.checkpoint.save_in_time(trainer)
            return
        self.checkpoint.save(trainer)
        self.checkpoint.wait(trainer)
        if trainer.world_size == 1:
            self.run.clear_stop_request()  # with several processes, the one that started them still has to see it
        step = trainer.global_step
        when = f"after step {step}, which is saved" if step else "before the first step"
        raise StopRequested(f"stopped {when}: {request.reason}", requeue=request.requeue)
