"""Times a few steps of a recipe."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, cast

import fiddle as fdl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead import tasks
from fiddlehead.attention import Target
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.data.random_tokens import RandomTokens
from fiddlehead.environment import describe_gpus, describe_machine
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.atomic import write_atomically
from fiddlehead.plan import attention
from fiddlehead.plan.attention_calls import calls_of
from fiddlehead.recipe import Recipe
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.prediction import Prediction
from fiddlehead.training import Checkpoint, LanguageModel, Log
from fiddlehead.training.callbacks.checkpoint import at_step_end
from fiddlehead.training.callbacks.expected import Expected
from fiddlehead.training.callbacks.metrics import Metrics, num_adapted, peak_memory, speed
from fiddlehead.training.callbacks.phases import Window, exposed_communication
from fiddlehead.training.optim import Optim

PACKAGES = ("fiddlehead", "torch", "lightning", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")
RESULTS = "bench.json"
"""The file with the results in a benchmark's run directory: `figures`, `what` was measured, `where`, and the `plan`."""


def as_benchmark(recipe: Recipe, *, steps: int, warmup: int, random_tokens: bool = False) -> Recipe:
    """Returns a recipe that times `steps` steps of `recipe`, after `warmup` untimed steps.

    Args:
        random_tokens: train on random tokens instead of the recipe's data.

    Raises:
        ConfigError: the recipe is not a training, or cannot be timed in this way.
    """
    task = recipe.__fn_or_cls__
    if task not in (tasks.pretrain, tasks.finetune):
        raise ConfigError(f"the recipe configures {task.__module__}:{task.__qualname__}, not a training")
    message = "a benchmark keeps no files; profile a run with the same edits"
    kept = {"log.profile": recipe.log.profile, "log.nsys": recipe.log.nsys}
    refuse(Problem(path, steps, message) for path, steps in kept.items() if steps is not None)
    arguments = {str(name): value for name, value in fdl.ordered_arguments(recipe.clone()).items()}
    timed = Recipe(benchmark, **arguments, steps=steps)
    timed.trainer.max_steps = warmup + steps
    timed.trainer.log_every_n_steps = warmup + steps  # a line waits for the device, so there is none between
    timed.log.tensorboard = timed.log.wandb = timed.log.mlflow = False
    timed.log.loggers = ()
    timed.checkpoint = fdl.Config(NoCheckpoint)
    if random_tokens:
        timed.data = _random_tokens(timed)
    else:
        timed.data.val_samples = 0
    return timed


def _random_tokens(recipe: Recipe) -> fdl.Config[RandomTokens]:
    data = recipe.data
    if fdl.get_callable(data) is not PreTrainingDataModule:
        raise ConfigError("--random-tokens is for pretraining; fine-tuning is timed on its own examples")
    if data.separate_documents:
        raise ConfigError("--random-tokens makes no documents, which data.separate_documents=True needs")
    if recipe.model.init_from is not None:
        raise ConfigError("--random-tokens does not fit the weights of model.init_from, which have a tokenizer")
    vocab_size = recipe.model.config.vocab_size or cast(PreTrainingDataModule, fdl.build(data)).vocab_size
    names = ("seq_length", "micro_batch_size", "global_batch_size", "num_workers", "seed")
    return fdl.Config(RandomTokens, vocab_size=vocab_size, **{name: getattr(data, name) for name in names})


def benchmark(
    model: LanguageModel,
    data: PreTrainingDataModule | FineTuningDataModule,
    trainer: Trainer,
    optim: Optim,
    log: Log,
    checkpoint: Checkpoint,
    resume: str | Path = "auto",
    seed: int = 1234,
    steps: int = 20,
) -> RunDirectory:
    """Trains as `pretrain` does, and writes the figures of the last `steps` steps into the run's directory.

    Figures of the timed steps: `tokens_per_s`, `tokens_per_s_per_device`, `tflops_per_s`, `memory_gib`, and `mfu` and
    `mfu_full` if the device's peak is known, as in `fiddlehead.training.callbacks.metrics.Metrics`; `seconds_per_step`,
    a spread; `seconds_data`, `seconds_forward`, `seconds_backward` and `seconds_optimizer`, means;
    `seconds_to_first_step`, from this call to the end of the first step, with building and compiling the model.
    """
    started = time.perf_counter()
    observer = _Observer()
    trainer.callbacks.append(observer)  # type: ignore[attr-defined]  # Lightning sets it dynamically
    run = tasks.pretrain(model, data, trainer, optim, log, checkpoint, resume, seed)
    if not trainer.is_global_zero:
        return run
    device = trainer.strategy.root_device
    metrics = next(callback for callback in trainer.callbacks if isinstance(callback, Metrics))  # type: ignore[attr-defined]
    window = Window(0.0, metrics.window.steps[-steps:])
    seconds = [sum(step.values()) for step in window.steps]
    rate = metrics.tokens_per_step * len(seconds) / sum(seconds)
    rates = speed(model.config, data.seq_length, rate, trainer.world_size, metrics.peak_flops, num_adapted(model))
    figures = {
        **rates,
        "tokens_per_s_per_device": rate / trainer.world_size,
        "seconds_per_step": {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)},
        **window.means(),
        **observer.figures,
        "seconds_to_first_step": observer.first_step - started,
    }
    where: dict[str, Any] = {**describe_machine(PACKAGES), "gpus": observer.gpus}
    if device.type == "cuda":
        cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        where["versions"] = {**where["versions"], **cuda}
    results = {"figures": figures, "what": _what(model, data, trainer, steps), "where": where}
    if (predicted := run.prediction()) is not None and predicted.knows:
        results["plan"] = planned_figures(predicted)
    write_atomically(run.path / RESULTS, json.dumps(results, indent=1) + "\n")
    return run


def planned_figures(predicted: Prediction) -> dict[str, Any]:
    """What the plan predicts, by the names of the figures."""
    found = {
        "tokens_per_s": predicted.tokens_per_s,
        "tokens_per_s_per_device": predicted.tokens_per_s and predicted.tokens_per_s / predicted.gpus,
        "seconds_per_step": predicted.seconds_per_step,
        "mfu": predicted.mfu,
        "memory_gib": predicted.memory_gib,
    }
    return {name: value for name, value in found.items() if value is not None}


def _what(model: LanguageModel, data: Any, trainer: Trainer, steps: int) -> dict[str, Any]:
    """The timed recipe, as JSON values."""
    calls = calls_of(model, model.config, data, str(trainer.precision), trainer.strategy)
    chosen = attention.choose(calls, Target.of(trainer.strategy.root_device))
    return {
        "data": type(data).__name__,
        "seq_length": data.seq_length,
        "micro_batch_size": data.micro_batch_size,
        "global_batch_size": data.global_batch_size,
        "tokens_per_step": data.global_batch_size * data.seq_length,
        "parameters": sum(parameter.numel() for parameter in model.transformer.parameters()),
        "device": _device_name(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "attention": attention.rows(chosen),
        "threads": torch.get_num_threads(),
        "steps": steps,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class NoCheckpoint(Checkpoint):
    """Saves nothing."""

    def __init__(self) -> None:
        super().__init__(keep_best=False)

    def save(self, trainer: Trainer, *, best: bool = False) -> None:
        """Does nothing."""


class _Observer(Callback):
    """Records values that cannot be read after training: the end of the first step, memory, clocks."""

    def __init__(self) -> None:
        self.first_step = 0.0
        self.figures: dict[str, float] = {}
        self.gpus: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves out the comparison with the plan, which waits for the device in the middle of the timed steps."""
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Expected)]  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Waits for the first step, and records when it ended."""
        if not self.first_step and at_step_end(trainer):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.first_step = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the clocks while they are still at their rates under load."""
        self.gpus = describe_gpus()
        self.figures["memory_gib"] = peak_memory(pl_module.device)
        if pl_module.device.type == "cuda":
            self.figures["memory_reserved_gib"] = torch.cuda.max_memory_reserved(pl_module.device) / 2**30
        communication = exposed_communication(trainer)
        if communication is not None:
            self.figures["seconds_communication"] = communication
