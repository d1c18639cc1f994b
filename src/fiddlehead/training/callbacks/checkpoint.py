"""Decides when a run is saved and which of its checkpoints are kept.

A resumed run is exact, because the rest of its state is a function of the step: the sampler, the schedule and dropout.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.checkpoints.folder import TEMPORARY, DamagedCheckpointError, newest_first, read_state, step_folder
from fiddlehead.checkpoints.io import SafetensorsIO, added_keys, storable
from fiddlehead.data.checksums import Checksums
from fiddlehead.data.tokenizers import save_tokenizer
from fiddlehead.errors import Problem, StopRequested, refuse
from fiddlehead.numbers import is_whole
from fiddlehead.run.console import say


class Checkpoint(Callback):
    """Keeps the newest checkpoints of a run, and the best by validation loss.

    Args:
        every_n_steps: how often to save; the last step, and the one at which the run is stopped, are always saved.
        keep_last: how many of the newest to keep.
        keep_best: how many of those with the lowest `val_loss` to keep too; true is 1. `checkpoints/best` points to the
            best.
        every_n_minutes: save also the step that ends this long after the last checkpoint. The first rank's clock
            decides for all.
        asynchronous: copy the tensors to main memory, and write them while the run goes on; a run that ends waits for
            the last of them, and one that is killed has the checkpoint before.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        keep_last: int = 2,
        keep_best: bool | int = True,
        asynchronous: bool = False,
        every_n_minutes: float | None = None,
    ) -> None:
        problems = [
            Problem(name, value, "must be a whole number of 1 or more")
            for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last))
            if not (is_whole(value) and value >= 1)
        ]
        if not isinstance(keep_best, bool) and not (is_whole(keep_best) and keep_best >= 0):
            problems.append(Problem("keep_best", keep_best, "must be true, false, or how many to keep"))
        if every_n_minutes is not None and not 0 < every_n_minutes < math.inf:
            problems.append(Problem("every_n_minutes", every_n_minutes, "must be more than 0, or None"))
        refuse(problems)
        self.every_n_steps, self.keep_last, self.keep_best = every_n_steps, keep_last, int(keep_best)
        self.every_n_minutes = every_n_minutes
        self.io = SafetensorsIO(asynchronous=asynchronous)
        self.directory = Path("checkpoints")
        self.data: Checksums = {}
        """The checksums of the data, which a checkpoint keeps."""
        self.best_loss: float | None = None
        self._losses: dict[int, float] = {}
        """The validation loss of steps; those of the best ones are saved."""
        self._saved_step = -1
        self._saved_at = math.inf
        self._unstorable: set[str] = set()
        self._wanted = False
        """Whether the step in hand is to be saved once it is validated."""
        self._validated_step = -1
        self._val_loss: float | None = None

    def begin(self, directory: Path, data: Checksums) -> None:
        """Saves into `directory` from now on, with the checksums of the data."""
        self.directory, self.data = directory, data

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Deletes what a killed attempt left half-written, and finds the best checkpoint."""
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover)
        # On every rank, because all must agree on what to save.
        self.best_loss = self._recall_best_loss()
        self._losses = self._recall_losses() if self.keep_best > 1 else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the tokenizer beside the checkpoints, because the model is useless without it."""
        if trainer.is_global_zero:
            save_tokenizer(trainer.datamodule.tokenizer, self.directory.parent)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed step is saved already; if it was stopped before its validation, validates it first."""
        self._saved_step, self._saved_at = trainer.global_step, monotonic()
        if self._validated_step == -1 and trainer.global_step and validates_now(trainer):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every n-th step, unless its validation comes first."""
        if not at_step_end(trainer):
            return
        # Lightning then ends the loop, which this step does anyway, and validates first.
        trainer.should_stop = trainer.should_stop or trainer.global_step >= trainer.max_steps
        if trainer.global_step % self.every_n_steps == 0 and not validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves an n-th step, or the best step so far."""
        if trainer.sanity_checking:
            return
        self._val_loss = float(trainer.callback_metrics.get("val_loss", float("nan")))
        self._validated_step = trainer.global_step
        better = bool(self.keep_best) and self._val_loss < (math.inf if self.best_loss is None else self.best_loss)
        self._losses[trainer.global_step] = self._val_loss
        among_best = better or (self.keep_best > 1 and trainer.global_step in self._best_steps())
        if among_best or self._wanted or trainer.global_step % self.every_n_steps == 0:
            self._saved_step = -1  # also if it was saved before, without its validation loss
            self.save(trainer, best=better)
        if better:
            self.best_loss = self._val_loss

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step, and waits until all checkpoints are written."""
        self.save(trainer)
        self.wait(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Waits for pending writes, unless the run was stopped, which has waited already or must not wait."""
        if not isinstance(exception, StopRequested):
            try:
                self.io.wait()
            except Exception as error:  # beside the one that ends the run
                say(f"WARNING: a checkpoint was not written: {error}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the data's checksums and the step's validation loss, which finds the best; None without a validation.

        Leaves out the states of callbacks, and what they add, that are not plain values, and says so once.
        """
        states = checkpoint.setdefault("callbacks", {})
        added = {key: checkpoint[key] for key in added_keys(checkpoint)}
        for holder, values, what in (
            (states, states, "the state of "),
            (checkpoint, added, "what a callback adds as "),
        ):
            for name in [name for name, value in values.items() if not storable(value)]:
                del holder[name]
                if name not in self._unstorable:
                    self._unstorable.add(name)
                    say(f"WARNING: checkpoints do not keep {what}{name}: it has more than numbers, texts and tensors")
        checkpoint["data"] = self.data
        checkpoint["val_loss"] = self._val_loss if self._validated_step == trainer.global_step else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads whether the resumed step was validated."""
        self._val_loss = checkpoint["val_loss"]
        self._validated_step = -1 if self._val_loss is None else checkpoint["global_step"]

    def is_due(self) -> bool:
        """Whether `every_n_minutes` have passed since the last checkpoint, by this rank's clock."""
        return self.every_n_minutes is not None and monotonic() - self._saved_at >= 60 * self.every_n_minutes

    def save_in_time(self, trainer: Trainer) -> None:
        """Saves a step at its end, or after its validation, so that its loss is saved with it."""
        self._wanted = validates_now(trainer)
        if not self._wanted:
            self.save(trainer)

    def save(self, trainer: Trainer, *, best: bool = False) -> None:
        """Saves the current step, once, and if it is the best so far, has `checkpoints/best` point to it.

        It does nothing before the first step.

        Raises:
            NonFiniteError: a step so far was not finite; nothing is written then.
            CheckpointNotWrittenError: this checkpoint, or the one before it, could not be written to the disk.
        """
        if trainer.global_step == self._saved_step:
            return
        trainer.lightning_module.raise_if_non_finite()  # type: ignore[operator]
        trainer.save_checkpoint(self.directory / step_folder(trainer.global_step))
        self._saved_step, self._saved_at, self._wanted = trainer.global_step, monotonic(), False
        if trainer.is_global_zero:
            self.io.then(partial(self._keep, trainer.global_step, best, self._best_steps()))

    def wait(self, trainer: Trainer) -> None:
        """Waits until all ranks have written their checkpoints; once one rank has left, the others have little time.

        Raises:
            CheckpointNotWrittenError: a checkpoint could not be written to the disk.
        """
        self.io.wait()
        trainer.strategy.barrier("Checkpoint.wait")

    def _best_steps(self) -> set[int]:
        """The steps with the lowest losses, as many as are kept; of equal ones the earliest."""
        losses = sorted((loss, step) for step, loss in self._losses.items() if math.isfinite(loss))
        return {step for _, step in losses[: self.keep_best]}

    def _keep(self, step: int, best: bool, best_steps: Collection[int]) -> None:
        """Links a written checkpoint as the best if it is, and deletes the checkpoints that are no longer kept."""
        if best:
            link = self.directory / ".best.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(step_folder(step))
            link.replace(self.directory / "best")
        self._delete_old(step, best_steps)

    def _recall_best_loss(self) -> float | None:
        best = self.directory / "best"
        if not best.exists():
            return None
        try:
            return read_state(best)["val_loss"]  # nothing else of it is wanted
        except DamagedCheckpointError as error:
            say(f"WARNING: the best checkpoint is damaged, so the next one validated is the best: {error}")
            return None

    def _recall_losses(self) -> dict[int, float]:
        """The losses of the checkpoints that are there; a damaged one is passed over when it is resumed from."""
        losses = {}
        for path in newest_first(self.directory):
            with contextlib.suppress(DamagedCheckpointError):
                state = read_state(path)
                if state["val_loss"] is not None:
                    losses[state["step"]] = state["val_loss"]
        return losses

    def _delete_old(self, step: int, best_steps: Collection[int]) -> None:
        # One of a later step was passed over as damaged when the run was resumed: it is not among the newest to keep.
        written = [path for path in newest_first(self.directory) if path.name <= step_folder(step)]
        kept = {path.name for path in written[: self.keep_last]}
        best = self.directory / "best"
        if self.keep_best and best.is_symlink():
            kept.add(best.readlink().name)
        kept |= {step_folder(each) for each in best_steps}
        for path in written:
            if path.name not in kept:
                # Renamed first: a checkpoint that is half deleted must not look like a damaged one.
                doomed = path.rename(path.with_name(f"{TEMPORARY}deleted-{path.name}"))
                shutil.rmtree(doomed)


def restore_progress(trainer: Trainer, step: int) -> None:
    """Sets Lightning's counters to what they are after `step` optimizer steps.

    Lightning saves and restores them itself, with a state for every place in the loop where a run may stop. Here every
    checkpoint is of a finished step, so they follow from its number.
    """
    loop = trainer.fit_loop.epoch_loop
    batches = step * trainer.accumulate_grad_batches
    for name in ("ready", "started", "processed", "completed"):
        setattr(loop.batch_progress.total, name, batches)
    optimizer = loop.automatic_optimization.optim_progress.optimizer.step.total
    optimizer.ready = optimizer.completed = step
    loop.scheduler_progress.total.ready = loop.scheduler_progress.total.completed = step
    loop._batches_that_stepped = step


def at_step_end(trainer: Trainer) -> bool:
    """Whether the last micro-batch was the last of its step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning validates after the last step."""
    due = trainer.fit_loop.epoch_loop.batch_progress.total.ready % trainer.val_check_batch == 0  # type: ignore[operator]
    return bool(trainer.num_val_batches) and (due or trainer.should_stop)
