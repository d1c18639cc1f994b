"""The tasks that a recipe configures, `pretrain` and `finetune`: they complete its parts and train in a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from fiddlehead.checkpoints.folder import verified_by_first
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.errors import ConfigError, refuse
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.paths import user_path
from fiddlehead.plan import attention
from fiddlehead.plan.refusals import predict
from fiddlehead.plan.resume import Start, data_checksums, resume_point
from fiddlehead.plan.training import TrainingPlan, begin, plan_training
from fiddlehead.plan.verify import differences
from fiddlehead.recipe.resumable import Resumable
from fiddlehead.run.console import is_rank_zero, say
from fiddlehead.run.directory import PRIVATE, RunDirectory
from fiddlehead.run.names import reserve_name
from fiddlehead.run.team import Team
from fiddlehead.training import Checkpoint, LanguageModel, Log, Parallel
from fiddlehead.training.callbacks.samples import SampleAnswer
from fiddlehead.training.fit import fit
from fiddlehead.training.kernel_cache import keep_compiled_kernels
from fiddlehead.training.optim import Optim
from fiddlehead.training.process import process_restored


def pretrain(
    model: LanguageModel,
    data: PreTrainingDataModule | FineTuningDataModule,
    trainer: Trainer,
    optim: Optim,
    log: Resumable[Log],
    checkpoint: Resumable[Checkpoint],
    resume: Resumable[str | Path] = "auto",
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
    # One rank reads a checkpoint whole to check it, and all go on from the same.
    model.initial.source = verified_by_first(ranks, lambda: begin(model, data, trainer, optim))
    begin(model, data, trainer, optim)
    plan = plan_training(model, data, trainer, optim, log, seed=seed)
    if plan.missing:
        raise ConfigError(*plan.missing)
    plan.apply(model, data, trainer)
    if model.optim is None:  # its constructor was not called by a recipe, or is a user's, which does not take it
        model.optim = optim
    run = RunDirectory(user_path(log.dir) / (log.name or reserve_name("pretrain", log.dir)))
    launched = run.prediction()
    if different := differences(launched, plan, trainer.strategy.root_device):
        print(f"WARNING: {'; '.join(different)}", flush=True)  # noqa: T201  # each rank has a GPU of its own
    predicted = predict(plan, () if launched is None else launched.despite)
    start = _start(run, resume, model, optim, str(trainer.precision), plan, ranks)
    step = 0 if start is None else start.step
    if step >= plan.max_steps:
        say(f"{run.path} has reached step {step} of {plan.max_steps}: nothing is left to train")
        return run
    checkpoint.begin(run.checkpoints, ranks.all(lambda: data_checksums(data, start) if ranks.first else {})[0])
    say(f"run {run.path}: {'starts anew' if start is None else f'continues from {start.path}'}")
    with process_restored(), attention.compared(plan.attention):
        run.path.mkdir(PRIVATE, parents=True, exist_ok=True)
        if model.computation.compile is not None or optim.compiles(trainer.strategy.root_device):
            keep_compiled_kernels()
        if is_rank_zero():
            run.write_prediction(predicted)
        _record_attention(run, plan, trainer.strategy.root_device)
        if resume not in ("auto", "never"):
            write_atomically(run.path / "resumed_from", str(resume))
        fit(
            *(model, data, trainer, log, checkpoint),
            run=run,
            seed=seed,
            tokens_per_step=plan.tokens_per_step,
            predicted=predicted,
            peak_flops=0.0 if plan.card is None else plan.card.flops,
            resume_from=None if start is None else start.path,
            step=step,
        )
    return run


def _start(
    run: RunDirectory,
    resume: str | Path,
    model: LanguageModel,
    optim: Optim,
    precision: str,
    plan: TrainingPlan,
    ranks: Team,
) -> Start | None:
    """The checkpoint that the run goes on from, with the model set to what that run began with; None starts anew.

    Raises:
        ConfigError: the checkpoint is of another run, or the weights that its run began with are gone or have changed.
    """
    found = verified_by_first(ranks, lambda: resume_point(run, resume))
    start, initial = None if found is None else Start.read(found), model.initial
    if start is not None:
        start.refuse_others(plan.config, optim.kind, precision)
        start.warn_of_another_rate(optim, plan.max_steps)
        # What a run's name stands for may have gone on since; this run goes on with what it began with.
        base = verified_by_first(ranks, lambda: start.base(initial.source))
        if base and str(base) != str(initial.source):
            initial.source = base
            verified_by_first(ranks, model.take_shape)
            refuse([] if initial.missing is None else [initial.missing.under("model")])
    initial.base = verified_by_first(ranks, initial.fingerprint)
    return start


def finetune(
    model: LanguageModel,
    data: FineTuningDataModule,
    trainer: Trainer,
    optim: Optim,
    log: Resumable[Log],
    checkpoint: Resumable[Checkpoint],
    resume: Resumable[str | Path] = "auto",
    seed: int = 1234,
) -> RunDirectory:
    """Trains a pretrained model on examples of answers, or on pairs of answers.

    As `pretrain`, beginning with the model that `model.init_from` names. Each validation also prints the model's answer
    to the first validation example.
    """
    trainer.callbacks.append(SampleAnswer())  # type: ignore[attr-defined]  # Lightning sets it dynamically
    return pretrain(model, data, trainer, optim, log, checkpoint, resume, seed)


def _record_attention(run: RunDirectory, plan: TrainingPlan, device: torch.device) -> None:
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
