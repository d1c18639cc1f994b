"""Calls Lightning's `Trainer.fit` with the callbacks and loggers that every run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from fiddlehead.checkpoints.folder import newest_good
from fiddlehead.run.console import is_rank_zero, say
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.prediction import Prediction
from fiddlehead.training.callbacks.checkpoint import Checkpoint, restore_progress
from fiddlehead.training.callbacks.dropout import SeedDropout
from fiddlehead.training.callbacks.early_end import EarlyEnd
from fiddlehead.training.callbacks.expected import Expected
from fiddlehead.training.callbacks.garbage import CollectGarbage
from fiddlehead.training.callbacks.metrics import Metrics
from fiddlehead.training.callbacks.nsys import Nsys
from fiddlehead.training.callbacks.phases import Phases
from fiddlehead.training.callbacks.profile import Profile
from fiddlehead.training.callbacks.stop import StopOnRequest
from fiddlehead.training.frozen import halve_frozen
from fiddlehead.training.language_model import LanguageModel
from fiddlehead.training.loggers import Log
from fiddlehead.training.non_finite import NonFiniteError


def fit(
    model: LanguageModel,
    data: LightningDataModule,
    trainer: Trainer,
    log: Log,
    checkpoint: Checkpoint,
    *,
    run: RunDirectory,
    seed: int,
    tokens_per_step: int,
    predicted: Prediction,
    peak_flops: float = 0.0,
    resume_from: Path | None = None,
    step: int = 0,
) -> None:
    """Trains to the trainer's `max_steps`; the run's directory gets metrics and checkpoints.

    Args:
        seed: of the initialization and dropout.
        predicted: what the plan predicts; the run is compared with it.
        peak_flops: FLOPs a second of each device at its peak; 0 if not known.
        resume_from: the checkpoint to go on from, which has finished `step` steps.

    Raises:
        NonFiniteError: the loss or the gradient became infinite or NaN; the message names the last good checkpoint.
    """
    seed_everything(seed, workers=True, verbose=False)
    trainer.strategy.checkpoint_io = checkpoint.io  # before the strategy tells it which ranks there are
    halve_frozen(model, trainer)
    if isinstance(trainer.val_check_interval, int):  # users count in steps, Lightning in micro-batches
        trainer.val_check_interval *= trainer.accumulate_grad_batches
    trainer.loggers = log.open(run, step)
    phases = Phases()
    every_n_steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    metrics = Metrics(tokens_per_step, data.seq_length, every_n_steps, phases, peak_flops)  # type: ignore[attr-defined]
    # The order matters: a step is measured, then saved, and only then may the run stop; none of it is a phase.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
    callbacks += [metrics, SeedDropout(seed)]
    if predicted.knows:
        callbacks.append(Expected(predicted, phases, every_n_steps))
    if log.profile_steps:
        callbacks.append(Profile(log.profile_steps, run.path / "profile", phases, shapes=log.profile_shapes))
    if log.nsys_steps:
        callbacks.append(Nsys(log.nsys_steps, phases))
    callbacks += [checkpoint, CollectGarbage(), StopOnRequest(checkpoint, run), EarlyEnd(run), phases]
    if resume_from is not None:
        restore_progress(trainer, step)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except NonFiniteError as error:
        if not is_rank_zero():  # it would read what the first rank reads
            raise
        good = newest_good(run.checkpoints)
        last = f"The last good checkpoint is {good}" if good else "There is no checkpoint yet"
        raise NonFiniteError(f"{error}. {last}") from error
    if trainer.global_step > step or resume_from is None:
        _report(trainer)


def _report(trainer: Trainer) -> None:
    metrics = trainer.callback_metrics
    if "val_nats_per_byte" in metrics:
        say(f"validation: {float(metrics['val_nats_per_byte']):.4f} nats/byte")
    elif "val_loss" in metrics:
        say(f"validation: {float(metrics['val_loss']):.4f} nats/token")
