"""When a run is saved, and how Lightning's state becomes the folder that `checkpoint_folder` describes.

What is resumed from it is exact, because all the rest of a run's state follows from the step: the sampler, the schedule
and dropout are functions of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file

from fiddlehead.errors import ConfigError
from fiddlehead.training.checkpoint_folder import (
    TEMPORARY,
    DamagedCheckpointError,
    newest_first,
    step_folder,
    verify,
    write_folder,
    write_state,
)
from fiddlehead.training.console import say

_TENSOR, _PAIRS = "__tensor__", "__pairs__"


class Checkpoint(Callback):
    """Keeps the newest checkpoints of a run, and the best by validation loss.

    Args:
        every_n_steps: how often to save; the last step, and the one at which the run is stopped, are always saved.
        keep_last: how many of the newest to keep.
        keep_best: whether to keep the one with the lowest `val_loss` too; `checkpoints/best` points to it.
    """

    def __init__(self, every_n_steps: int = 1000, keep_last: int = 2, keep_best: bool = True) -> None:
        problems = [
            f"{name}={value!r}: must be 1 or more"
            for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last))
            if value < 1
        ]
        if problems:
            raise ConfigError(*problems)
        self.every_n_steps, self.keep_last, self.keep_best = every_n_steps, keep_last, keep_best
        self.directory = Path("checkpoints")
        self.best_loss: float | None = None
        self._saved_step = -1
        self._validated_step = -1
        self._val_loss: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clears what a killed attempt left half-written, and recalls which checkpoint is the best."""
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover)
        self.best_loss = self._recall_best_loss()  # on every rank: all must agree on what to save

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the tokenizer beside the checkpoints: without it the model is of no use."""
        if trainer.is_global_zero:
            tokenizer: Any = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
            tokenizer.save(self.directory.parent / "tokenizer.json")
            for file in getattr(tokenizer, "companions", ()):
                if file.parent.resolve() != self.directory.parent.resolve():
                    shutil.copyfile(file, self.directory.parent / file.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed step is already saved; if it was stopped before its validation, that is made up for first."""
        self._saved_step = trainer.global_step
        if self._validated_step == -1 and trainer.global_step and validates_now(trainer):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time, unless this step is validated first."""
        if not at_step_end(trainer):
            return
        # Lightning then ends the loop, which this step does anyway, and validates first.
        trainer.should_stop = trainer.should_stop or trainer.global_step >= trainer.max_steps
        if trainer.global_step % self.every_n_steps == 0 and not validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves a step that was to be saved or that is the best so far."""
        if trainer.sanity_checking:
            return
        self._val_loss = float(trainer.callback_metrics.get("val_loss", float("nan")))
        self._validated_step = trainer.global_step
        better = self.keep_best and self._val_loss < (float("inf") if self.best_loss is None else self.best_loss)
        if better or trainer.global_step % self.every_n_steps == 0:
            self._saved_step = -1  # also if it was saved before, without its validation loss
            self.save(trainer)
        if better:
            self.best_loss = self._val_loss
            if trainer.is_global_zero:
                link = self.directory / ".best.tmp"
                link.unlink(missing_ok=True)
                link.symlink_to(step_folder(trainer.global_step))
                link.replace(self.directory / "best")
                self._delete_old()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step."""
        self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the step's validation loss, by which the best is known; None if it was not validated."""
        checkpoint["val_loss"] = self._val_loss if self._validated_step == trainer.global_step else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Recalls whether the step that is resumed was validated."""
        self._val_loss = checkpoint["val_loss"]
        self._validated_step = -1 if self._val_loss is None else checkpoint["global_step"]

    def save(self, trainer: Trainer) -> None:
        """Saves the current step, once; does nothing before the first.

        Raises:
            NonFiniteError: a step so far was not finite; nothing is written then.
        """
        if trainer.global_step == self._saved_step:
            return
        trainer.lightning_module.raise_if_non_finite()  # type: ignore[operator]
        trainer.save_checkpoint(self.directory / step_folder(trainer.global_step))
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._delete_old()

    def _recall_best_loss(self) -> float | None:
        best = self.directory / "best"
        if not best.exists():
            return None
        try:
            return verify(best)["val_loss"]
        except DamagedCheckpointError as error:
            say(f"WARNING: the best checkpoint is damaged, so the next one validated is the best: {error}")
            return None

    def _delete_old(self) -> None:
        # One of a later step was passed over as damaged when the run was resumed: it is not among the newest to keep.
        written = [path for path in newest_first(self.directory) if path.name <= step_folder(self._saved_step)]
        kept = {path.name for path in written[: self.keep_last]}
        best = self.directory / "best"
        if self.keep_best and best.is_symlink():
            kept.add(best.readlink().name)
        for path in written:
            if path.name not in kept:
                # Renamed first: a checkpoint that is half deleted must not look like a damaged one.
                doomed = path.rename(path.with_name(f"{TEMPORARY}deleted-{path.name}"))
                shutil.rmtree(doomed)


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoints as a folder of safetensors and JSON instead of a pickle."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the folder `path`; on any error, a full disk for one, it leaves nothing there."""
        path = Path(path)
        # The loops' counters and callbacks are left out: `restore_progress` derives them from the step.
        optimizer_tensors: dict[str, torch.Tensor] = {}
        kept = ("optimizer_states", "lr_schedulers", "config", "lora", "init_from", "val_loss", "MixedPrecision")
        state = {key: _encode(checkpoint[key], key, optimizer_tensors) for key in kept if key in checkpoint}
        model_tensors = {name: tensor.contiguous() for name, tensor in checkpoint["state_dict"].items()}
        with write_folder(path) as folder:
            save_file(model_tensors, folder / "model.safetensors", metadata={"format": "pt"})
            save_file(optimizer_tensors, folder / "optimizer.safetensors")
            write_state(folder, state | {"step": checkpoint["global_step"]})

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads the folder `path` back into the dictionary that Lightning restores from.

        Raises:
            DamagedCheckpointError: a file is missing or is not what was written.
        """
        state = verify(Path(path))
        tensors = load_file(Path(path) / "optimizer.safetensors")
        checkpoint = {key: _decode(value, tensors) for key, value in state.items()}
        checkpoint["state_dict"] = load_file(Path(path) / "model.safetensors")
        checkpoint["global_step"], checkpoint["epoch"] = state["step"], 0
        checkpoint["pytorch-lightning_version"] = "2.6.0"  # what Lightning would migrate from; nothing to migrate here
        checkpoint["callbacks"] = {}
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes the folder `path`."""
        shutil.rmtree(path)


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
    """Whether the micro-batch that just ended was the last of its step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning validates after the step that just ended."""
    due = trainer.fit_loop.epoch_loop.batch_progress.total.ready % trainer.val_check_batch == 0  # type: ignore[operator]
    return bool(trainer.num_val_batches) and (due or trainer.should_stop)


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON form of `value`; its tensors go into `tensors` under the path that leads to them."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        pairs = [(key, _encode(item, f"{name}.{key}", tensors)) for key, item in value.items()]
        return dict(pairs) if all(isinstance(key, str) for key in value) else {_PAIRS: pairs}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        return tensors[value[_TENSOR]]
    if isinstance(value, dict) and _PAIRS in value:
        return {key: _decode(item, tensors) for key, item in value[_PAIRS]}
    if isinstance(value, dict):
        return {key: _decode(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    return value
