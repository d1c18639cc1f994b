"""What follows from the parts of a training together, and what is wrong with them, besides what each finds itself."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, TypeAlias

from lightning.pytorch import Trainer

from fiddlehead.checkpoints.folder import MAX_STEP
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.models import TransformerConfig
from fiddlehead.numbers import is_number, is_whole
from fiddlehead.plan.callbacks import callback_problems, monitor_problems
from fiddlehead.run.console import say
from fiddlehead.training import LanguageModel, Log, Parallel
from fiddlehead.training.distributed.pipeline import refuse_zero_bubble
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.optim import Optim

Data: TypeAlias = PreTrainingDataModule | FineTuningDataModule

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
"""Without float16: its loss scaling hides an infinite gradient, and breaks the clipping of a fused optimizer."""


def derived(
    model: LanguageModel, data: Data, trainer: Trainer, optim: Optim, log: Log | None, sizes: Sizes
) -> tuple[int, TransformerConfig]:
    """The number of micro-batches in a step, and the model's complete shape, which follow from all parts.

    Args:
        sizes: of the ranks.

    Raises:
        ConfigError: the parts do not fit together; the error lists every problem.
    """
    strategy = trainer.strategy if isinstance(trainer.strategy, Parallel) else None
    cut = strategy if trainer.num_devices * trainer.num_nodes > 1 else None
    problems: list[Problem] = []
    if cut is not None and model.computation.compile == "model":
        problems.append(Problem("model.compile", "model", "a model cut over several devices takes 'layers' or None"))
    accumulate, micro_batches = 1, None
    try:
        accumulate = micro_batches = data.accumulate_grad_batches(sizes.data)
    except ConfigError as error:
        problems += error.under("data").problems
    problems += trainer_problems(trainer, accumulate, sizes.data) + epoch_problems(trainer, data, sizes.data)
    problems += [] if log is None else profile_problems(log, trainer)
    problems += callback_problems(trainer) + monitor_problems(trainer, model, data)
    config = lengthened(model, data.seq_length)
    try:
        vocab_size = vocabulary(config, data)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    if vocab_size is not None:
        problems += ConfigError(*data.too_short()).under("data").problems
    problems += model_problems(config, data, vocab_size)
    problems += model.problems(str(trainer.precision), sizes)
    if strategy is not None:
        divided = strategy.problems(config, data.seq_length, micro_batches)
        problems += [each.under("trainer.strategy") for each in divided]
        settings = {
            "model.compile": model.computation.compile,
            "model.activation_checkpointing": model.computation.activation_checkpointing,
            "model.fp8": model.computation.fp8,
            "model.tiled_mlp": model.computation.tiled_mlp,
            "model.tiled_attention": model.computation.tiled_attention,
            "trainer.strategy.tensor_parallel": strategy.tensor_parallel,
        }
        problems += refuse_zero_bubble(strategy.pipeline_schedule, settings)
    split = None if cut is None else sizes
    problems += optim.problems(str(trainer.precision), split, adapters=model.lora is not None)
    refuse(problems)
    return accumulate, completed(config, data, vocab_size)


def seed_problems(seed: int) -> list[Problem]:
    """The problems of the initialization's seed, which NumPy takes in 32 bits."""
    fits = is_whole(seed) and 0 <= seed < 2**32
    return [] if fits else [Problem("seed", seed, "must be a whole number from 0 to 4294967295")]


def profile_problems(log: Log, trainer: Trainer) -> list[Problem]:
    """The problems of the steps to profile."""
    message = f"the run ends with step trainer.max_steps={trainer.max_steps}"
    return [
        Problem(path, given, message)
        for path, given, steps in (
            ("log.profile", log.profile, log.profile_steps),
            ("log.nsys", log.nsys, log.nsys_steps),
        )
        if steps is not None and steps[1] > trainer.max_steps
    ]


def lacking(model: LanguageModel, data: Data) -> tuple[Problem, ...]:
    """What a training lacks that its plan does not need: weights to begin with, and data."""
    weights = model.initial.missing
    if weights is None and model.initial.source is None and isinstance(data, FineTuningDataModule):
        weights = Problem("init_from", None, "name a trained model, with which fine-tuning begins")
    found = () if weights is None else (weights.under("model"),)
    return (*found, *(ConfigError(data.missing).under("data").problems if data.missing else ()))


def trainer_problems(trainer: Trainer, accumulate: int, data_parallel: int) -> list[Problem]:
    """What is wrong with the trainer.

    Args:
        accumulate: how many micro-batches a step has, by the data.
        data_parallel: how many ranks, or groups of them, train on different samples.
    """
    problems = []
    if not (is_whole(trainer.max_steps) and trainer.max_steps >= 1):
        message = "must be 1 or more; a run ends by steps, not by epochs"
        problems.append(Problem("trainer.max_steps", trainer.max_steps, message))
    elif trainer.max_steps > MAX_STEP:
        message = f"must be at most {MAX_STEP:,}: a checkpoint's name has eight digits for its step"
        problems.append(Problem("trainer.max_steps", trainer.max_steps, message))
    elif (least := trainer.min_steps) is not None and not (is_whole(least) and 0 <= least <= trainer.max_steps):
        message = f"must be a whole number of steps, at most trainer.max_steps={trainer.max_steps}, or None"
        problems.append(Problem("trainer.min_steps", least, message))
    if (given := trainer.accumulate_grad_batches) not in (1, accumulate):
        message = f"leave it out; the data's batch sizes on {data_parallel} data-parallel ranks make it {accumulate}"
        problems.append(Problem("trainer.accumulate_grad_batches", given, message))
    every: Any = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not (is_whole(every) and every >= 1):
        problems.append(Problem("trainer.log_every_n_steps", every, "must be a whole number of steps, 1 or more"))
    if (precision := str(trainer.precision)) not in PRECISIONS:
        half = "the loss scaling of float16 hides an infinite gradient" if precision.startswith("16") else ""
        problems.append(Problem("trainer.precision", precision, half, PRECISIONS))
    if batches := getattr(trainer, "overfit_batches", 0):
        message = "the order of the data is a function of the step; leave it out"
        problems.append(Problem("trainer.overfit_batches", batches, message))
    elif not _limits_of_a_trial(trainer) and not _all_batches(limit := trainer.limit_train_batches):
        problems.append(Problem("trainer.limit_train_batches", limit, "trainer.max_steps ends a run; leave it out"))
    if steps := getattr(trainer, "fast_dev_run", False):
        message = "use trainer.max_steps=1, or --dryrun; in Python, recipe.plan()"
        problems.append(Problem("trainer.fast_dev_run", steps, message))
    if trainer.checkpoint_callback is not None:
        message = "`checkpoint` decides; leave it out, and callbacks that save"
        problems.append(Problem("trainer.enable_checkpointing", True, message))
    if trainer.loggers:
        problems.append(Problem("trainer.logger", message="log.loggers has a run's own loggers; leave it out"))
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        problems.append(Problem("trainer.gradient_clip_val", trainer.gradient_clip_val, "must not be negative"))
    if (algorithm := trainer.gradient_clip_algorithm) not in (None, "norm"):
        given = str(getattr(algorithm, "value", algorithm))
        problems.append(Problem("trainer.gradient_clip_algorithm", given, "", ("norm",)))
    if (method := getattr(trainer.strategy, "_start_method", "popen")) != "popen":  # of Lightning's DDPStrategy
        message = f"starts processes by {method!r}, and a run starts its own; use 'auto', 'ddp' or Parallel"
        problems.append(Problem("trainer.strategy", message=message))
    return problems


def epoch_problems(trainer: Trainer, data: Data, data_parallel: int) -> list[Problem]:
    """What is said in epochs or batches, with the same in steps or samples where the data is known."""
    problems = []
    try:
        samples, val_samples = data.num_samples("train"), data.num_samples("val")
    except ConfigError:  # which is said of the data itself
        samples, val_samples = None, None
    interval: Any = trainer.val_check_interval
    if interval != 1.0 and (not isinstance(interval, int) or interval < 1):
        message = "must be a whole number of steps, 1 or more"
        if samples and is_number(interval) and 0 < interval < 1:
            steps = max(1, round(interval * samples / data.global_batch_size))
            message += f"; so much of an epoch of this data is {steps}"
        problems.append(Problem("trainer.val_check_interval", interval, message))
    trial = _limits_of_a_trial(trainer)
    if (epochs := trainer.max_epochs) not in (None, -1) and not trial:
        message = "trainer.max_steps ends a run; leave it at -1"
        if samples and is_whole(epochs) and epochs > 0:
            steps = math.ceil(epochs * samples / data.global_batch_size)
            message += f"; so many epochs of this data are trainer.max_steps={steps}"
        problems.append(Problem("trainer.max_epochs", epochs, message))
    if epochs := trainer.min_epochs:
        message = "a run is one epoch of Lightning's; leave it out, and set trainer.min_steps"
        problems.append(Problem("trainer.min_epochs", epochs, message))
    if (every := trainer.check_val_every_n_epoch) not in (None, 1):
        message = "a run is one epoch of Lightning's; leave it out, and set trainer.val_check_interval"
        problems.append(Problem("trainer.check_val_every_n_epoch", every, message))
    if not trial and not _all_batches(limit := trainer.limit_val_batches):
        message = "data.val_samples says how many samples a validation has, 0 for none; leave it out"
        batch = data.micro_batch_size * data_parallel
        wanted = limit * batch if is_whole(limit) else None if val_samples is None else round(limit * val_samples)
        if wanted is not None:
            message += f", and set data.val_samples={wanted}"
        problems.append(Problem("trainer.limit_val_batches", limit, message))
    return problems


def _limits_of_a_trial(trainer: Trainer) -> bool:
    """Whether `fast_dev_run` or `overfit_batches`, which are refused, have set the trainer's limits."""
    return bool(getattr(trainer, "overfit_batches", 0) or getattr(trainer, "fast_dev_run", False))


def _all_batches(limit: float | None) -> bool:
    """Whether Lightning takes all batches: 1.0 is all of them, and the int 1 is one."""
    return limit is None or (limit == 1.0 and not is_whole(limit))


def model_problems(config: TransformerConfig, data: Data, vocab_size: int | None) -> list[Problem]:
    """What of the model's shape does not fit the data, whose tokenizer has `vocab_size` tokens; None: not known."""
    problems = []
    rows = config.vocab_size
    if rows is not None and vocab_size is not None and (missing := data.missing_rows(rows)):
        message = f"{'; '.join(missing)}; the tokenizer has {vocab_size} tokens"
        problems.append(Problem("model.config.vocab_size", rows, message))
    if config.seq_length is not None and config.seq_length < data.seq_length:
        message = f"is shorter than data.seq_length={data.seq_length}; leave it out"
        problems.append(Problem("model.config.seq_length", config.seq_length, message))
    if config.num_moe_experts is None:
        message = "there are no experts; set model.config.num_moe_experts, or leave it out"
        problems += [
            Problem(f"model.config.{field.name}", value, message)
            for field in fields(config)
            if field.name.startswith("moe_") and (value := getattr(config, field.name)) not in (None, field.default)
        ]
    return problems


def vocabulary(config: TransformerConfig, data: Data) -> int | None:
    """How many tokens the data's tokenizer has; None if it is not here, and the model's shape says it.

    Raises:
        ConfigError: the data is here and cannot be read, or nothing says it.
    """
    if isinstance(data, FineTuningDataModule) and not data.has_tokenizer:
        if config.vocab_size is None:
            message = "neither the weights nor a tokenizer are here, so give it"
            raise ConfigError(Problem("model.config.vocab_size", None, message))
        return None
    try:
        return data.vocab_size
    except ConfigError as error:
        if data.missing and config.vocab_size is not None:
            return None
        raise error.under("data") from error


def completed(config: TransformerConfig, data: Data, vocab_size: int | None) -> TransformerConfig:
    """The model's shape with what follows from the data; `vocab_size` is by `vocabulary`."""
    return replace(config, vocab_size=config.vocab_size or vocab_size, seq_length=config.seq_length or data.seq_length)


def lengthened(model: LanguageModel, seq_length: int) -> TransformerConfig:
    """The model's shape. If rotary weights go on with sequences longer than those they learned, it prints a warning."""
    config, learned, source = model.config, model.config.seq_length, model.initial.source
    if source is None or learned is None or learned >= seq_length:
        return config
    if config.position_embedding_type == "learned_absolute":
        return config
    say(f"WARNING: {source} learned sequences of {learned} tokens; data.seq_length={seq_length} is longer")
    return replace(config, seq_length=seq_length)
