"""Says why a run ends before its last step, as with Lightning's EarlyStopping, and keeps it ended."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason

from fiddlehead.run.console import say
from fiddlehead.run.directory import RunDirectory


class EarlyEnd(Callback):
    """Writes the reason to the run's directory, for its status.

    A checkpoint keeps the state of `EarlyStopping`, but not that it has ended the run; a run that is started again ends
    at once.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a run that had ended."""
        if trainer.is_global_zero:
            self.run.write_early_end("")
        if _stopped(trainer) is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says why the run ends, if that is not its last step."""
        if trainer.global_step >= trainer.max_steps:
            return
        stopped = _stopped(trainer)
        told = "a callback asked for it" if stopped is None else stopped.stopping_reason_message or "EarlyStopping"
        told = told.replace(" Signaling Trainer to stop.", "").rstrip(".")
        reason = f"ended early, at step {trainer.global_step} of {trainer.max_steps}: {told}"
        say(reason)
        if trainer.is_global_zero:
            self.run.write_early_end(reason)


def _stopped(trainer: Trainer) -> EarlyStopping | None:
    """The callback that has ended the run; None if none has."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            return callback
    return None
