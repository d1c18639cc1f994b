"""Derives a training's sizes, kernels and memory from its parts, and collects everything that is wrong."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.pytorch import Trainer

from fiddlehead.attention import Target
from fiddlehead.checkpoints.weights import find_tokenizer
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.models import TransformerConfig
from fiddlehead.numbers import is_whole
from fiddlehead.plan import attention
from fiddlehead.plan.attention_calls import calls_of
from fiddlehead.plan.cards import CARDS, Card
from fiddlehead.plan.layouts import Layout, layouts
from fiddlehead.plan.memory import Memory
from fiddlehead.plan.rank_memory import Devices, Training, memory_and_speed
from fiddlehead.plan.remedies import Remedy, remedies
from fiddlehead.plan.speed import Speed
from fiddlehead.run.console import say
from fiddlehead.training import LanguageModel, Log, Parallel, PreferenceModel
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.frozen import halves_frozen
from fiddlehead.training.optim import Optim
from fiddlehead.training.parts import refuse_others

Data: TypeAlias = PreTrainingDataModule | FineTuningDataModule

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
"""Without float16: its loss scaling hides an infinite gradient, and breaks the clipping of a fused optimizer."""


@dataclass(frozen=True)
class TrainingPlan:
    """The sizes, kernels and memory of a run's training."""

    config: TransformerConfig
    """The model's shape, with the vocabulary and the sequence length that follow from the data."""
    parameters: int
    trained: int
    """How many of the parameters are trained: all, or those of adapters."""
    max_steps: int
    world_size: int
    data_parallel: int
    """How many ranks, or groups of them, train on different samples."""
    micro_batch_size: int
    accumulate_grad_batches: int
    tokens_per_step: int
    attention: attention.Choices
    """Empty if the training device is not known."""
    state_gib: float
    """Parameters, gradients and optimizer state of one full copy, without activations."""
    device_gib: float
    """The part that each device holds."""
    warmup_steps: int
    memory: Memory | None = None
    """Of the GPU that has the most; None on a CPU, and where preferences are learned, which is not worked out yet."""
    card: Card | None = None
    """The GPU that trains, if it is known."""
    speed: Speed | None = None
    """How fast it trains; None if the GPU is not known, in float32, and where preferences are learned."""
    remedies: tuple[Remedy, ...] = ()
    """The smallest changes that make it fit, if it does not, or only just."""
    layouts: tuple[Layout, ...] = ()
    """How these GPUs could train it, fastest first, if they were searched."""
    missing: tuple[str, ...] = ()
    """Why it cannot start: without weights to begin with, or without data."""
    checkpoint_bytes: int = 0
    """The size of a checkpoint: what is trained, and the optimizer's state."""

    @property
    def tokens(self) -> int:
        """How many tokens the whole run trains on."""
        return self.tokens_per_step * self.max_steps

    @property
    def flops(self) -> float:
        """The FLOPs of the whole run, without recomputation."""
        adapters = None if self.trained == self.parameters else self.trained
        a_token = self.config.train_flops_per_token(self.config.seq_length or 0, adapters=adapters)
        return a_token * self.tokens

    @property
    def fits(self) -> bool | None:
        """Whether the GPU has enough memory; None if that is not known."""
        return None if not self.verdict else self.verdict != "does not fit"

    @property
    def verdict(self) -> str:
        """ "fits", "tight" or "does not fit"; "" if that is not known."""
        return "" if self.memory is None or self.card is None else self.memory.fits(self.card.gib)

    def apply(self, model: LanguageModel, data: Data, trainer: Trainer) -> None:
        """Completes the parts: the model's shape, the data's vocabulary, the trainer's accumulation."""
        model.config = self.config
        data.model_vocab_size = self.config.vocab_size
        trainer.accumulate_grad_batches = self.accumulate_grad_batches

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of a summary."""
        config = self.config
        warmup = f"{self.warmup_steps:,} of them warm-up"
        if self.warmup_steps >= self.max_steps:
            warmup = f"which end before the warm-up does ({self.warmup_steps:,} steps)"
        heads = f"{config.num_attention_heads} heads in {config.groups} groups of {config.head_dim} channels"
        trained = "" if self.trained == self.parameters else f" ({self.trained / 1e6:,.2f} M of them trained)"
        return [
            ("model", f"{self.parameters / 1e6:,.2f} M parameters{trained}, {config.num_layers} layers, {heads}"),
            ("vocabulary, sequence", f"{config.vocab_size:,} tokens, {config.seq_length:,} long"),
            (
                "a step",
                f"{self.tokens_per_step:,} tokens: {self._ranks()} x {self.micro_batch_size} sequences "
                f"x {self.accumulate_grad_batches} accumulated",
            ),
            ("the run", f"{self.max_steps:,} steps, {warmup}"),
            ("", f"{self.tokens:,} tokens, {self.flops:.2e} FLOPs"),
            *self._memory_rows(),
            *(self.speed.rows(self.max_steps, self.world_size) if self.speed is not None else []),
            *(("missing", reason) for reason in self.missing),
            *([("", "the weights are not known, so the shape is model.config's")] if self._lacks_weights() else []),
            *zip(itertools.chain(["attention"], itertools.repeat("")), self._attention_rows(), strict=False),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `attention` has the `Served.to_dict` of each call."""
        others = ("config", "attention", "memory", "card", "speed", "layouts", "remedies")
        fields = {name: value for name, value in vars(self).items() if name not in others}
        return {
            "config": asdict(self.config),
            **fields,
            "flops": self.flops,
            "attention": [each.to_dict() for each in self.attention],
            "memory": None if self.memory is None else self.memory.to_dict(),
            "speed": None if self.speed is None else self.speed.to_dict(),
            "card": None if self.card is None else asdict(self.card),
            "fits": self.fits,
            "verdict": self.verdict,
            "remedies": [each.to_dict() for each in self.remedies],
        }

    def _lacks_weights(self) -> bool:
        return any(isinstance(reason, Problem) and reason.path == "model.init_from" for reason in self.missing)

    def _ranks(self) -> str:
        if self.data_parallel == self.world_size:
            return f"{self.world_size} devices"
        return f"{self.data_parallel} groups of {self.world_size // self.data_parallel} devices"

    def _memory_rows(self) -> list[tuple[str, str]]:
        """What is in memory at its peak, where that is worked out."""
        state = f"{self.state_gib:.2f} GiB"
        if self.device_gib != self.state_gib:
            state = f"{self.device_gib:.2f} GiB on each device (of {state} in all)"
        more = ", plus activations" if self.memory is None else ""
        rows = [("memory", f"{state} for parameters, gradients and optimizer{more}")]
        if self.memory is None:
            return rows
        names = itertools.chain(["at its peak"], itertools.repeat(""))
        rows += [(name, f"{size}  {part}") for name, (part, size) in zip(names, self.memory.rows(), strict=False)]
        if self.card is not None:
            rows.append(("", f"{self.verdict}: {self.card.name} has {self.card.gib:.1f} GiB"))
            names = itertools.chain(["what makes it fit"], itertools.repeat(""))
            rows += [(name, remedy.row()) for name, remedy in zip(names, self.remedies, strict=False)]
        return rows

    def _attention_rows(self) -> list[str]:
        return attention.rows(self.attention) or [f"{self.config.attention_backend}, on the GPU that trains"]


def begin(model: LanguageModel, data: Data, trainer: Trainer, optim: Optim) -> str | Path | None:
    """Opens the weights that a model begins with, for its shape and for the tokenizer of fine-tuning data.

    Returns where they are; None if the model begins with random weights.

    Raises:
        ConfigError: a training cannot use a part, or the weights are missing or of another shape.
    """
    refuse_others(model, data, trainer, optim)
    try:
        model.take_shape()
    except ConfigError as error:
        lacking = [f"data.{data.missing}"] if data.missing else []
        raise ConfigError(*error.under("model").problems, *lacking) from error
    if isinstance(data, FineTuningDataModule):
        known = model.init_from is not None and model.missing is None
        data.default_tokenizer = find_tokenizer(user_path(model.init_from)) if known else None  # type: ignore[arg-type]
    return model.init_from


def plan_training(
    model: LanguageModel,
    data: Data,
    trainer: Trainer,
    optim: Optim,
    log: Log | None = None,
    *,
    target: Target | Card | Literal["trainer"] | None = "trainer",
    search: bool = False,
    **others: Any,
) -> TrainingPlan:
    """Plans a training. It does not change the parts; `TrainingPlan.apply` completes them.

    Args:
        model: after `begin`.
        target: the device that trains: "trainer" is the trainer's, None an unknown GPU.
        search: also search the layouts that fit; where the GPU is known.
        others: other arguments of the task, which change nothing.

    Raises:
        ConfigError: the parts do not fit together; the error lists every problem.
    """
    world_size = trainer.num_devices * trainer.num_nodes
    sizes = Sizes(data=world_size, replicate=world_size)
    if isinstance(trainer.strategy, Parallel):
        try:
            sizes = trainer.strategy.sizes(world_size)
        except ConfigError as error:
            raise error.under("trainer.strategy") from error
    accumulate, config = _fitting(model, data, trainer, optim, log, sizes)
    try:
        transformer = model.on_meta(config)
    except ConfigError as error:
        raise error.under("model") from error
    learned = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for _, parameter in learned)
    precision = str(trainer.precision)
    each = 2 if precision == "bf16-true" else 4
    frozen_bytes = (parameters - trained) * (2 if halves_frozen(model, trainer) else each)
    state_gib = (frozen_bytes + 2 * each * trained + optim.state_bytes(learned, precision)) / 2**30  # 2: the gradients
    device, card = _device(target, trainer)
    on_gpu = device is None or device.device_type == "cuda"
    parts = Training(model, transformer, data, Devices.of(trainer), optim)
    gathered_gib = sizes.gathered(parts.counted) * ((4 if precision == "32-true" else 2) + 4) / 2**30
    memory, speed = None, None
    if on_gpu:
        memory, speed = memory_and_speed(parts, sizes, card)
    short = memory is not None and card is not None and memory.fits(card.gib) != "fits"
    return TrainingPlan(
        config=config,
        parameters=parameters,
        trained=trained,
        max_steps=int(trainer.max_steps),
        world_size=world_size,
        data_parallel=sizes.data,
        micro_batch_size=data.micro_batch_size,
        accumulate_grad_batches=accumulate,
        tokens_per_step=data.global_batch_size * data.seq_length,
        attention=_kernels(model, config, data, trainer, device),
        state_gib=state_gib,
        device_gib=state_gib * sizes.held(parts.counted) / parameters + gathered_gib,
        warmup_steps=optim.lr_scheduler.warmup_steps,
        memory=memory,
        card=card,
        speed=speed,
        layouts=tuple(layouts(parts, card)) if search and card is not None else (),
        remedies=remedies(parts, card, speed) if short and card is not None else (),
        missing=_missing(model, data),
        checkpoint_bytes=each * trained + optim.state_bytes(learned, precision),
    )


def search_layouts(
    model: LanguageModel,
    data: Data,
    trainer: Trainer,
    optim: Optim,
    log: Log | None = None,
    *,
    target: Card | Literal["trainer"],
    **others: Any,
) -> list[Layout]:
    """The layouts of a training that fit, fastest first, also if its own is refused.

    The arguments are those of `plan_training`.

    Raises:
        ConfigError: the data or the model cannot be used, or memory and speed are not known for it or its GPU.
    """
    if isinstance(model, PreferenceModel):
        raise ConfigError(
            Problem("model", "PreferenceModel", "its memory is not worked out, so no layout is known to fit")
        )
    card = _device(target, trainer)[1]
    if card is None:
        raise ConfigError(Problem("gpu", None, "this machine's GPU is not known; name the one that trains", CARDS))
    if str(trainer.precision) == "32-true" or not card.flops or not card.bytes_per_s:
        given = str(trainer.precision) if card.flops else card.name
        raise ConfigError(Problem("trainer.precision" if card.flops else "gpu", given, "its speed is not worked out"))
    try:
        vocab_size = _vocab_size(model, data)
    except ConfigError as error:
        raise error.under("data") from error
    if vocab_size is None:
        raise ConfigError(_NO_VOCABULARY)
    try:
        transformer = model.on_meta(_completed(_longer(model, data.seq_length), data, vocab_size))
    except ConfigError as error:
        raise error.under("model") from error
    return layouts(Training(model, transformer, data, Devices.of(trainer), optim), card)


_NO_VOCABULARY = Problem("model.config.vocab_size", None, "neither the weights nor a tokenizer are here, so give it")


def _has_tokenizer(data: Data) -> bool:
    return not isinstance(data, FineTuningDataModule) or data.has_tokenizer


def _vocab_size(model: LanguageModel, data: Data) -> int | None:
    """The number of different tokens: the tokenizer's, or the model's where there is none; None if it is not known."""
    return data.vocab_size if _has_tokenizer(data) else model.config.vocab_size


def _missing(model: LanguageModel, data: Data) -> tuple[str, ...]:
    """What a training lacks that its plan does not need: weights to begin with, and data."""
    weights = model.missing
    if weights is None and model.init_from is None and isinstance(data, FineTuningDataModule):
        weights = Problem("init_from", None, "name a trained model, with which fine-tuning begins")
    found = [] if weights is None else [weights.under("model")]
    return (*found, *([f"data.{data.missing}"] if data.missing else []))


def _fitting(
    model: LanguageModel, data: Data, trainer: Trainer, optim: Optim, log: Log | None, sizes: Sizes
) -> tuple[int, TransformerConfig]:
    """The number of micro-batches in a step, and the model's complete shape; raises ConfigError with every problem."""
    strategy = trainer.strategy if isinstance(trainer.strategy, Parallel) else None
    cut = strategy if trainer.num_devices * trainer.num_nodes > 1 else None
    problems: list[Problem] = []
    if cut is not None and model.compile_mode == "model":
        problems.append(Problem("model.compile", "model", "a model cut over several devices takes 'layers' or None"))
    accumulate, micro_batches = 1, None
    try:
        accumulate = micro_batches = data.accumulate_grad_batches(sizes.data)
    except ConfigError as error:
        problems += error.under("data").problems
    problems += _trainer_problems(trainer, accumulate, sizes.data)
    if log is not None and log.profile_steps and log.profile_steps[1] > trainer.max_steps:
        message = f"the run ends with step trainer.max_steps={trainer.max_steps}"
        problems.append(Problem("log.profile", log.profile, message))
    try:
        vocab_size = _vocab_size(model, data)
    except ConfigError as error:  # the dataset cannot be read
        raise ConfigError(*problems, *error.under("data").problems) from error
    problems += ConfigError(*data.too_short()).under("data").problems
    config = _longer(model, data.seq_length)
    if vocab_size is None:
        raise ConfigError(*problems, _NO_VOCABULARY)
    if _has_tokenizer(data):
        problems += _vocabulary_problems(config, data, vocab_size)
    problems += _length_problems(config, data)
    problems += model.problems(str(trainer.precision), sizes)
    if strategy is not None:
        divided = strategy.problems(config, data.seq_length, micro_batches)
        problems += [each.under("trainer.strategy") for each in divided]
    split = None if cut is None else sizes
    problems += optim.problems(str(trainer.precision), split, adapters=model.lora is not None)
    refuse(problems)
    return accumulate, _completed(config, data, vocab_size)


def _device(target: Target | Card | Literal["trainer"] | None, trainer: Trainer) -> tuple[Target | None, Card | None]:
    """The device that trains, None if its kernels are not known; and its card."""
    if isinstance(target, Card):
        return target.target, target
    if target == "trainer":
        device = trainer.strategy.root_device
        found = Target.of(device)
        return found, Card.of(found, device)
    return target, Card.of(target)


def _kernels(
    model: LanguageModel,
    config: TransformerConfig,
    data: Data,
    trainer: Trainer,
    target: Target | None,
) -> attention.Choices:
    """The kernels that serve on `target`; empty if it is not known."""
    calls = calls_of(model, config, data, str(trainer.precision), trainer.strategy)
    try:
        if target is None:
            attention.refuse_impossible(calls)
            return ()
        return attention.choose(calls, target)
    except ConfigError as error:
        raise error.under("model.config") from error


def _trainer_problems(trainer: Trainer, accumulate: int, data_parallel: int) -> list[Problem]:
    problems = []
    if not (is_whole(trainer.max_steps) and trainer.max_steps >= 1):
        message = "must be 1 or more; a run ends by steps, not by epochs"
        problems.append(Problem("trainer.max_steps", trainer.max_steps, message))
    if (given := trainer.accumulate_grad_batches) not in (1, accumulate):
        message = f"leave it out; the data's batch sizes on {data_parallel} data-parallel ranks make it {accumulate}"
        problems.append(Problem("trainer.accumulate_grad_batches", given, message))
    every: Any = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not (is_whole(every) and every >= 1):
        problems.append(Problem("trainer.log_every_n_steps", every, "must be a whole number of steps, 1 or more"))
    interval = trainer.val_check_interval
    if interval != 1.0 and (not isinstance(interval, int) or interval < 1):
        problems.append(Problem("trainer.val_check_interval", interval, "must be a whole number of steps, 1 or more"))
    if str(trainer.precision) not in PRECISIONS:
        problems.append(Problem("trainer.precision", str(trainer.precision), "", PRECISIONS))
    if (limit := trainer.limit_train_batches) not in (None, 1.0):
        problems.append(Problem("trainer.limit_train_batches", limit, "trainer.max_steps ends a run; leave it out"))
    if (limit := trainer.limit_val_batches) not in (None, 1.0):
        message = "data.val_samples says how many samples a validation has, 0 for none; leave it out"
        problems.append(Problem("trainer.limit_val_batches", limit, message))
    if batches := getattr(trainer, "overfit_batches", 0):
        message = "the order of the data is a function of the step; leave it out"
        problems.append(Problem("trainer.overfit_batches", batches, message))
    if steps := getattr(trainer, "fast_dev_run", False):
        problems.append(Problem("trainer.fast_dev_run", steps, "use trainer.max_steps=1, or --dryrun"))
    if (epochs := trainer.max_epochs) not in (None, -1):
        problems.append(Problem("trainer.max_epochs", epochs, "trainer.max_steps ends a run; leave it at -1"))
    if trainer.checkpoint_callback is not None:
        problems.append(Problem("trainer.enable_checkpointing", True, "`checkpoint` decides; leave it out"))
    if trainer.loggers:
        problems.append(Problem("trainer.logger", message="`log` decides; leave it out"))
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        problems.append(Problem("trainer.gradient_clip_val", trainer.gradient_clip_val, "must not be negative"))
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        problems.append(Problem("trainer.gradient_clip_algorithm", str(trainer.gradient_clip_algorithm), "", ("norm",)))
    return problems


def _vocabulary_problems(config: TransformerConfig, data: Data, vocab_size: int) -> list[Problem]:
    if config.vocab_size is None or not (missing := data.missing_rows(config.vocab_size)):
        return []
    message = f"{'; '.join(missing)}; the tokenizer has {vocab_size} tokens"
    return [Problem("model.config.vocab_size", config.vocab_size, message)]


def _length_problems(config: TransformerConfig, data: Data) -> list[Problem]:
    problems = []
    if config.seq_length is not None and config.seq_length < data.seq_length:
        message = f"is shorter than data.seq_length={data.seq_length}; leave it out"
        problems.append(Problem("model.config.seq_length", config.seq_length, message))
    return problems


def _completed(config: TransformerConfig, data: Data, vocab_size: int) -> TransformerConfig:
    """The shape with what follows from the data."""
    return replace(config, vocab_size=config.vocab_size or vocab_size, seq_length=config.seq_length or data.seq_length)


def _longer(model: LanguageModel, seq_length: int) -> TransformerConfig:
    """The model's shape. If rotary weights go on with sequences longer than those they learned, it prints a warning."""
    config, learned = model.config, model.config.seq_length
    if model.init_from is None or learned is None or learned >= seq_length:
        return config
    if config.position_embedding_type == "learned_absolute":
        return config
    say(f"WARNING: {model.init_from} learned sequences of {learned} tokens; data.seq_length={seq_length} is longer")
    return replace(config, seq_length=seq_length)
