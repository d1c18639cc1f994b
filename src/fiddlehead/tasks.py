"""What a recipe configures: a task and its parts, checked against each other and run in a run directory."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from fiddlehead.attention import Target
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.data.checksums import Checksums, differences
from fiddlehead.errors import ConfigError
from fiddlehead.models import TransformerConfig
from fiddlehead.numbers import is_whole
from fiddlehead.paths import user_path
from fiddlehead.runs import PRIVATE, RunDirectory, find_run, reserve_name, write_atomically
from fiddlehead.training import Checkpoint, LanguageModel, Log, NonFiniteError, Parallel, attention
from fiddlehead.training.attention_calls import calls_of
from fiddlehead.training.checkpoint import restore_progress
from fiddlehead.training.checkpoint_folder import newest_good, read_state, verified_by_first, verify
from fiddlehead.training.console import is_rank_zero, say
from fiddlehead.training.frozen import halve_frozen, halves_frozen
from fiddlehead.training.garbage import CollectGarbage
from fiddlehead.training.kernel_cache import keep_compiled_kernels
from fiddlehead.training.metrics import Metrics
from fiddlehead.training.optim import Optim, kind_of
from fiddlehead.training.parts import refuse_others
from fiddlehead.training.phases import Phases
from fiddlehead.training.process import process_restored
from fiddlehead.training.profile import Profile
from fiddlehead.training.samples import SampleAnswer
from fiddlehead.training.sizes import Sizes
from fiddlehead.training.stop import StopOnRequest
from fiddlehead.training.team import Team
from fiddlehead.training.weights import find_tokenizer, open_weights

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
"""float16 is left out: its loss scaling hides an infinite gradient, and spoils the clipping of a fused optimizer."""


def pretrain(
    model: LanguageModel,
    data: PreTrainingDataModule | FineTuningDataModule,
    trainer: Trainer,
    optim: Optim,
    log: Log,
    checkpoint: Checkpoint,
    resume: str | Path = "auto",
    seed: int = 1234,
) -> RunDirectory:
    """Trains a language model from scratch, or goes on with a run that was interrupted.

    Args:
        resume: "auto" goes on from this run's newest good checkpoint, "never" refuses to touch a run that has one, and
            a path (of a checkpoint, or of a run) starts from there.
        seed: of the initialization and dropout; `data.seed` is that of the order of the data.

    Returns:
        The run's directory.

    Raises:
        ConfigError: the parts do not fit together; nothing was started then.
        NonFiniteError: the loss or the gradient became infinite or NaN; the checkpoints are from before.
    """
    ranks = trainer.strategy.join_ranks() if isinstance(trainer.strategy, Parallel) else Team()
    # One rank looks: that reads all of a checkpoint, and all have to go on from the same.
    if model.init_from is not None:
        model.init_from = verified_by_first(ranks, lambda: _begin(model))
    plan = plan_pretrain(model, data, trainer, optim, log)
    if plan.missing:
        raise ConfigError(plan.missing)
    run = RunDirectory(user_path(log.dir) / (log.name or reserve_name("pretrain", log.dir)))
    start = verified_by_first(ranks, lambda: resume_point(run, resume))
    step = 0
    if start is not None:
        state = read_state(start)
        step = int(state["step"])
        _refuse_another_model(start, state["config"], plan.config)
        _refuse_another_optimizer(start, state, optim)
        _warn_of_another_rate(state, optim, plan.max_steps)
        # What a run's name stands for may have gone on since; this run goes on with what it began with.
        began = state.get("init_from")
        if began and began != str(model.init_from):
            model.init_from = began
            verified_by_first(ranks, lambda: bool(open_weights(began)))
    if step >= plan.max_steps:
        say(f"{run.path} has reached step {step} of {plan.max_steps}: nothing is left to train")
        return run
    checkpoint.data = ranks.all(lambda: _data_checksums(data, start) if ranks.first else {})[0]
    say(f"run {run.path}: {'starts anew' if start is None else f'continues from {start}'}")

    with process_restored():
        run.path.mkdir(PRIVATE, parents=True, exist_ok=True)
        if model.compile_mode is not None or optim.compiles(str(trainer.precision)):
            keep_compiled_kernels()
        _record_attention(run, plan, trainer.strategy.root_device)
        if resume not in ("auto", "never"):
            write_atomically(run.path / "resumed_from", str(resume))
        seed_everything(seed, workers=True, verbose=False)
        model.optim, model.seed = optim, seed
        checkpoint.directory = run.checkpoints
        trainer.strategy.checkpoint_io = checkpoint.io
        halve_frozen(model, trainer)
        if isinstance(trainer.val_check_interval, int):  # users count in steps, Lightning in micro-batches
            trainer.val_check_interval *= plan.accumulate_grad_batches
        trainer.loggers = log.loggers(run, step)
        every_n_steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        phases = Phases()
        metrics = Metrics(plan.tokens_per_step, data.seq_length, every_n_steps, phases)
        # The order matters: a step is measured, then saved, and only then may the run stop; none of it is a phase.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
        callbacks.append(metrics)
        if log.profile_steps:
            callbacks.append(Profile(log.profile_steps, run.path / "profile", phases, shapes=log.profile_shapes))
        callbacks += [checkpoint, CollectGarbage(), StopOnRequest(checkpoint, run), phases]
        if start is not None:
            restore_progress(trainer, step)
        try:
            with attention.compared(plan.attention):
                trainer.fit(model, datamodule=data, ckpt_path=start, weights_only=True)
        except NonFiniteError as error:
            if not is_rank_zero():  # it would read what the first rank reads
                raise
            good = newest_good(run.checkpoints)
            last = f"The last good checkpoint is {good}" if good else "There is no checkpoint yet"
            raise NonFiniteError(f"{error}. {last}") from error
    if start is None or trainer.global_step > step:
        _report(trainer)
    return run


def finetune(
    model: LanguageModel,
    data: FineTuningDataModule,
    trainer: Trainer,
    optim: Optim,
    log: Log,
    checkpoint: Checkpoint,
    resume: str | Path = "auto",
    seed: int = 1234,
) -> RunDirectory:
    """Trains a model that can write already on examples of what to answer, or on pairs of answers.

    As `pretrain`, with the model that `model.init_from` names to begin with; each validation also shows what the model
    answers to the first example of it.
    """
    trainer.callbacks.append(SampleAnswer())  # type: ignore[attr-defined]  # Lightning sets it dynamically
    return pretrain(model, data, trainer, optim, log, checkpoint, resume, seed)


@dataclass(frozen=True)
class Plan:
    """What a pretraining run amounts to, worked out without starting it."""

    config: TransformerConfig
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
    """Empty where the device that trains is not known."""
    state_gib: float
    """Parameters, gradients and optimizer state of one full copy, without activations."""
    device_gib: float
    """What each device holds of it."""
    warmup_steps: int
    missing: str = ""
    """Why it cannot start, for want of data; "" if it can."""

    @property
    def flops(self) -> float:
        """What the whole run computes, without recomputation."""
        adapters = None if self.trained == self.parameters else self.trained
        a_token = self.config.train_flops_per_token(self.config.seq_length or 0, adapters=adapters)
        return a_token * self.tokens_per_step * self.max_steps

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
            ("", f"{self.tokens_per_step * self.max_steps:,} tokens, {self.flops:.2e} FLOPs"),
            ("memory", f"{self._memory()} for parameters, gradients and optimizer, plus activations"),
            *([("data", f"none: {self.missing}")] if self.missing else []),
            *zip(itertools.chain(["attention"], itertools.repeat("")), self._attention_rows(), strict=False),
        ]

    def _ranks(self) -> str:
        if self.data_parallel == self.world_size:
            return f"{self.world_size} devices"
        return f"{self.data_parallel} groups of {self.world_size // self.data_parallel} devices"

    def _memory(self) -> str:
        if self.device_gib == self.state_gib:
            return f"{self.state_gib:.2f} GiB"
        return f"{self.device_gib:.2f} GiB on each device (of {self.state_gib:.2f} GiB in all)"

    def _attention_rows(self) -> list[str]:
        return attention.rows(self.attention) or [f"{self.config.attention_backend}, on the GPU that trains"]


def plan_pretrain(
    model: LanguageModel,
    data: PreTrainingDataModule | FineTuningDataModule,
    trainer: Trainer,
    optim: Optim,
    log: Log | None = None,
    *,
    elsewhere: bool = False,
    **others: Any,
) -> Plan:
    """Completes the parts with what follows from each other, and works out what the run amounts to.

    The model takes its vocabulary and sequence length from the data, the trainer its accumulation from the batch sizes.

    Args:
        elsewhere: the run is for another machine than this one, whose device need not be `trainer`'s.
        others: what else the task takes; it changes nothing.

    Raises:
        ConfigError: the parts do not fit together; it lists every problem.
    """
    refuse_others(model, data, trainer, optim)
    world_size = trainer.num_devices * trainer.num_nodes
    sizes = Sizes(data=world_size, replicate=world_size)
    problems: list[str] = []
    if isinstance(trainer.strategy, Parallel):
        try:
            sizes = trainer.strategy.sizes(world_size)
        except ConfigError as error:
            raise error.under("trainer.strategy") from error
        if world_size > 1 and model.compile_mode == "model":
            problems.append("model.compile='model': a model cut over several devices takes 'layers' or None")
    accumulate, micro_batches = 1, None
    _begin(model)
    if isinstance(data, FineTuningDataModule):
        if model.init_from is None:
            raise ConfigError("model.init_from=None: fine-tuning begins with a model that can write already; give one")
        data.default_tokenizer = find_tokenizer(user_path(model.init_from))
    try:
        accumulate = micro_batches = data.accumulate_grad_batches(sizes.data)
    except ConfigError as error:
        problems += error.under("data").problems
    problems += _trainer_problems(trainer, accumulate, sizes.data)
    if log is not None and log.profile_steps and log.profile_steps[1] > trainer.max_steps:
        problems.append(f"log.profile={log.profile!r}: the run ends with step trainer.max_steps={trainer.max_steps}")
    try:
        vocab_size = data.vocab_size
    except ConfigError as error:  # the dataset cannot be read
        raise ConfigError(*problems, *error.under("data").problems) from error
    problems += [f"data.{problem}" for problem in data.too_short()]
    if model.init_from is not None:
        _allow_longer(model, data.seq_length)
    problems += _model_problems(model.config, data, vocab_size)
    problems += model.problems(str(trainer.precision), sizes)
    if isinstance(trainer.strategy, Parallel):
        split = trainer.strategy.problems(model.config, data.seq_length, micro_batches)
        problems += [f"trainer.strategy.{each}" for each in split]
    sharded = trainer.strategy if isinstance(trainer.strategy, Parallel) and world_size > 1 else None
    problems += optim.problems(str(trainer.precision), sharded, adapters=model.lora is not None)
    if problems:
        raise ConfigError(*problems)

    model.config = replace(model.config, vocab_size=model.config.vocab_size or vocab_size)
    data.model_vocab_size = model.config.vocab_size
    model.config = replace(model.config, seq_length=model.config.seq_length or data.seq_length)
    trainer.accumulate_grad_batches = accumulate
    try:
        transformer = model.on_meta()
    except ConfigError as error:
        raise error.under("model") from error
    learned = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for _, parameter in learned)
    config, precision = model.config, str(trainer.precision)
    calls = calls_of(model, data, precision, trainer.strategy)
    choices: attention.Choices = ()
    try:
        if elsewhere:
            attention.refuse_impossible(calls)
        else:
            choices = attention.choose(calls, Target.of(trainer.strategy.root_device))
    except ConfigError as error:
        raise error.under("model.config") from error
    each = 2 if precision == "bf16-true" else 4
    frozen_bytes = (parameters - trained) * (2 if halves_frozen(model, trainer) else each)
    state_gib = (frozen_bytes + 2 * each * trained + optim.state_bytes(learned, precision)) / 2**30  # 2: the gradients
    gathered_gib = sizes.gathered(transformer) * ((4 if precision == "32-true" else 2) + 4) / 2**30
    return Plan(
        config=config,
        parameters=parameters,
        trained=trained,
        max_steps=int(trainer.max_steps),
        world_size=world_size,
        data_parallel=sizes.data,
        micro_batch_size=data.micro_batch_size,
        accumulate_grad_batches=accumulate,
        tokens_per_step=data.global_batch_size * data.seq_length,
        attention=choices,
        state_gib=state_gib,
        device_gib=state_gib * sizes.held(transformer) / parameters + gathered_gib,
        warmup_steps=optim.lr_scheduler.warmup_steps,
        missing=f"data.{data.missing}" if data.missing else "",
    )


def _begin(model: LanguageModel) -> str | Path | None:
    """Has the model take its shape, and returns the weights that it begins with."""
    try:
        model.take_shape()
    except ConfigError as error:
        raise error.under("model") from error
    return model.init_from


def resume_point(run: RunDirectory, resume: str | Path) -> Path | None:
    """The checkpoint that a run starts from; None for a fresh start.

    Raises:
        ConfigError: `resume` names nothing that can be resumed, or is "never" and the run has a checkpoint.
        DamagedCheckpointError: `resume` is the path of a checkpoint that is not whole.
    """
    own = newest_good(run.checkpoints)
    if resume == "auto":
        status = run.written_status()
        if own is None and status is not None and status.attempt > 1:
            say(f"WARNING: {run.path} was started before but has no good checkpoint: it starts again from step 0")
        return own
    if resume == "never":
        if own is not None:
            raise ConfigError(
                f"resume='never', but {run.path} has {own.name}, which would be lost; "
                "choose another log.name, or delete the run"
            )
        return None
    elsewhere = _checkpoint_at(resume, run.path.parent)
    if own is None:
        return elsewhere
    origin = run.path / "resumed_from"
    if (
        origin.exists() and origin.read_bytes() == str(resume).encode()
    ):  # it began there, and has its own progress since
        return own
    raise ConfigError(
        f"resume={str(resume)!r}, but {run.path} has {own.name} of its own; leave resume out to go on from there, or "
        "choose another log.name"
    )


def _checkpoint_at(resume: str | Path, runs: Path) -> Path:
    """The checkpoint that a path, or a run's name in the folder `runs`, stands for."""
    path = user_path(resume)
    if path.name.startswith("step-") or path.name == "best":
        if not path.is_dir():
            raise ConfigError(f"resume={str(resume)!r}: there is no such checkpoint")
        verify(path)
        return path
    try:
        checkpoint = newest_good(find_run(str(resume), runs).checkpoints)
    except ConfigError as error:
        raise ConfigError(*(f"resume={str(resume)!r}: {problem}" for problem in error.problems)) from None
    if checkpoint is None:
        raise ConfigError(f"resume={str(resume)!r}: the run has no good checkpoint")
    return checkpoint


def _record_attention(run: RunDirectory, plan: Plan, device: torch.device) -> None:
    """Tries the chosen kernels on this rank's device; says and writes down which serves which layers, and the errors.

    Raises:
        ConfigError: a kernel's output or gradient is wrong.
    """
    try:
        trials = attention.try_out(plan.attention, device)
    except ConfigError as error:
        raise error.under("model.config") from error
    if is_rank_zero():
        for line in attention.rows(plan.attention):
            say(f"attention: {line}")
        text = json.dumps(attention.record(plan.attention, trials), indent=1) + "\n"
        write_atomically(run.path / "attention.json", text)


def _refuse_another_model(checkpoint: Path, saved: dict[str, Any], config: TransformerConfig) -> None:
    """Raises ConfigError if the checkpoint's model is not the one that would be trained."""
    before = asdict(TransformerConfig.from_dict(saved))
    problems = [
        f"model.config.{name}={value!r}, but it is {before[name]!r} in {checkpoint}"
        for name, value in asdict(config).items()
        if name not in ("attention_backend", "seq_length") and before[name] != value
    ]
    if problems:
        raise ConfigError(*problems)


def _data_checksums(data: PreTrainingDataModule | FineTuningDataModule, start: Path | None) -> Checksums:
    """The data's checksums; raises ConfigError if they are not those of the checkpoint that a run starts from."""
    try:
        data.prepare_data()
        checksums = data.checksums()
    except ConfigError as error:
        raise error.under("data") from error
    before = None if start is None else read_state(start).get("data")
    if start is None or data.allow_changed:
        return checksums
    if before is None:
        say(f"WARNING: {start} does not say which data it was trained on; it is not compared")
    elif changed := differences(before, checksums):
        raise ConfigError(
            *(f"data: {each} since {start}" for each in changed),
            "data.allow_changed=False: set True to go on with other data, or begin a run with model.init_from",
        )
    return checksums


def _refuse_another_optimizer(checkpoint: Path, state: dict[str, Any], optim: Optim) -> None:
    """Raises ConfigError if what the checkpoint's optimizer kept is of no use to the one that is to go on."""
    saved = kind_of(state["optimizer_states"][0]["param_groups"])
    if saved != optim.kind:
        raise ConfigError(
            f"optim is {optim.kind}, but {checkpoint} was trained with {saved}; set that, or begin a run of its own "
            "with model.init_from"
        )


def _warn_of_another_rate(state: dict[str, Any], optim: Optim, max_steps: int) -> None:
    """Says so if the schedule goes on elsewhere than it left off, as it does when `max_steps` was changed."""
    left_off = state["lr_schedulers"][0]["_last_lr"][0]
    goes_on = optim.lr * optim.lr_scheduler(int(state["step"]), max_steps, optim.lr)
    if abs(goes_on - left_off) > 0.01 * optim.lr:
        say(
            f"WARNING: with max_steps={max_steps} the learning rate goes on at {goes_on:.2e}, not at {left_off:.2e}, "
            "where it left off"
        )


def _trainer_problems(trainer: Trainer, accumulate: int, data_parallel: int) -> list[str]:
    problems = []
    if not (is_whole(trainer.max_steps) and trainer.max_steps >= 1):
        problems.append(f"trainer.max_steps={trainer.max_steps}: must be 1 or more; a run ends by steps, not by epochs")
    if trainer.accumulate_grad_batches not in (1, accumulate):
        problems.append(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: leave it out; the data's batch sizes "
            f"on {data_parallel} data-parallel ranks make it {accumulate}"
        )
    every: Any = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not (is_whole(every) and every >= 1):
        problems.append(f"trainer.log_every_n_steps={every!r}: must be a whole number of steps, 1 or more")
    interval = trainer.val_check_interval
    if interval != 1.0 and (not isinstance(interval, int) or interval < 1):
        problems.append(f"trainer.val_check_interval={interval!r}: must be a whole number of steps, 1 or more")
    if str(trainer.precision) not in PRECISIONS:
        problems.append(f"trainer.precision={str(trainer.precision)!r}: allowed: {', '.join(PRECISIONS)}")
    if trainer.limit_train_batches not in (None, 1.0):
        problems.append("trainer.limit_train_batches: would cut the steps short; trainer.max_steps ends a run")
    if getattr(trainer, "overfit_batches", 0):
        problems.append("trainer.overfit_batches: the order of the data is a function of the step; leave it out")
    if getattr(trainer, "fast_dev_run", False):
        problems.append("trainer.fast_dev_run: use trainer.max_steps=1, or --dryrun")
    if trainer.max_epochs not in (None, -1):
        problems.append(f"trainer.max_epochs={trainer.max_epochs}: a run ends by trainer.max_steps; leave it at -1")
    if trainer.checkpoint_callback is not None:
        problems.append("trainer.enable_checkpointing=True: checkpoints are written as `checkpoint` says")
    if trainer.loggers:
        problems.append("trainer.logger: metrics are logged as `log` says")
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        problems.append(f"trainer.gradient_clip_val={trainer.gradient_clip_val!r}: must not be negative")
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        problems.append(f"trainer.gradient_clip_algorithm={str(trainer.gradient_clip_algorithm)!r}: allowed: 'norm'")
    return problems


def _model_problems(
    config: TransformerConfig, data: PreTrainingDataModule | FineTuningDataModule, vocab_size: int
) -> list[str]:
    problems = []
    if config.vocab_size is not None and (missing := data.missing_rows(config.vocab_size)):
        problems.append(
            f"model.config.vocab_size={config.vocab_size}: {'; '.join(missing)}; the tokenizer has {vocab_size} tokens"
        )
    if config.seq_length is not None and config.seq_length < data.seq_length:
        problems.append(
            f"model.config.seq_length={config.seq_length}: shorter than data.seq_length={data.seq_length}; leave it out"
        )
    return problems


def _allow_longer(model: LanguageModel, seq_length: int) -> None:
    """Says so if weights that learned shorter sequences are to go on with longer ones, as rotary positions let them."""
    learned = model.config.seq_length
    if learned is not None and learned < seq_length and model.config.position_embedding_type != "learned_absolute":
        say(f"WARNING: {model.init_from} learned sequences of {learned} tokens; data.seq_length={seq_length} is longer")
        model.config = replace(model.config, seq_length=seq_length)


def _report(trainer: Trainer) -> None:
    metrics = trainer.callback_metrics
    if "val_nats_per_byte" in metrics:
        say(f"validation: {float(metrics['val_nats_per_byte']):.4f} nats/byte")
    elif "val_loss" in metrics:
        say(f"validation: {float(metrics['val_loss']):.4f} nats/token")
