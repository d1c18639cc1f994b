"""Derives a training's sizes, kernels and memory from its parts, and collects everything that is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer

from fiddlehead.attention import Target
from fiddlehead.checkpoints.weights import find_tokenizer
from fiddlehead.data import FineTuningDataModule
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.mlp_choice import MlpChoice
from fiddlehead.plan import attention
from fiddlehead.plan.activations import halved_gradients
from fiddlehead.plan.attention_calls import calls_of
from fiddlehead.plan.cards import CARDS, Card
from fiddlehead.plan.data import DataPlan, data_plan
from fiddlehead.plan.layouts import Layout, layouts
from fiddlehead.plan.memory import Memory
from fiddlehead.plan.optimizer import OptimizerPlan, optimizer_plan
from fiddlehead.plan.problems import Data, completed, derived, lacking, lengthened, seed_problems, vocabulary
from fiddlehead.plan.rank_memory import Devices, Training, memory_and_speed
from fiddlehead.plan.remedies import Remedy, remedies
from fiddlehead.plan.rows import as_rows, sections
from fiddlehead.plan.speed import Speed
from fiddlehead.training import LanguageModel, Log
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.feed_forward import choose_mlp, refused_mlp
from fiddlehead.training.optim import Optim
from fiddlehead.training.parts import refuse_others


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
    mlp: MlpChoice | None
    """What computes the feed-forward; None if that depends on a device that is not known."""
    state_gib: float
    """Parameters, gradients and optimizer state of one full copy, without activations."""
    device_gib: float
    """The part that each device holds."""
    main_memory: dict[str, float]
    """What each device's process keeps in main memory instead of on the GPU, in words, and its bytes."""
    data: DataPlan
    """What it trains and validates on."""
    optimizer: OptimizerPlan
    memory: Memory | None = None
    """Of the GPU that has the most; None on a CPU."""
    card: Card | None = None
    """The GPU that trains, if it is known."""
    speed: Speed | None = None
    """How fast it trains; None if the GPU is not known, and in float32."""
    remedies: tuple[Remedy, ...] = ()
    """The smallest changes that make it fit, if it does not, or only just."""
    missing: tuple[Problem, ...] = ()
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

    @property
    def gpu_hours(self) -> float | None:
        """The hours of the whole run times the GPUs; None if its speed is not known."""
        return None if self.speed is None else self.speed.hours(self.max_steps) * self.world_size

    @property
    def lacks_weights(self) -> str:
        """Why the weights to begin with are not known, so that the shape is that of `model.config`; "" if they are."""
        return next((each for each in self.missing if getattr(each, "path", "") == "model.init_from"), "")

    def apply(self, model: LanguageModel, data: Data, trainer: Trainer) -> None:
        """Completes the parts: the model's shape, the data's vocabulary, the trainer's accumulation."""
        model.config = self.config
        data.model_vocab_size = self.config.vocab_size
        trainer.accumulate_grad_batches = self.accumulate_grad_batches

    def sections(self, usd_per_gpu_hour: float | None = None) -> dict[str, list[str]]:
        """The lines of a summary, by section; see `fiddlehead.plan.rows`."""
        return sections(self, usd_per_gpu_hour)

    def rows(self) -> list[tuple[str, str]]:
        """Section and text of each line of a summary; only the first line of a section has its name."""
        return as_rows(self.sections())

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `attention` has the `Served.to_dict` of each call."""
        others = ("config", "attention", "mlp", "memory", "card", "speed", "remedies", "data", "optimizer")
        fields = {name: value for name, value in vars(self).items() if name not in others}
        return {
            "config": asdict(self.config),
            **fields,
            "tokens": self.tokens,
            "flops": self.flops,
            "data": self.data.to_dict(),
            "optimizer": self.optimizer.to_dict(),
            "attention": [each.to_dict() for each in self.attention],
            "mlp": None if self.mlp is None else self.mlp._asdict(),
            "memory": None if self.memory is None else self.memory.to_dict(),
            "speed": None if self.speed is None else self.speed.to_dict(),
            "card": None if self.card is None else asdict(self.card),
            "fits": self.fits,
            "verdict": self.verdict,
            "remedies": [each.to_dict() for each in self.remedies],
            "hours": None if self.speed is None else self.speed.hours(self.max_steps),
            "gpu_hours": self.gpu_hours,
            "kwh": None if self.speed is None else self.speed.kwh(self.max_steps),
        }


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
    source = model.initial.source
    if isinstance(data, FineTuningDataModule):
        there = None if model.initial.missing else source
        data.default_tokenizer = None if there is None else find_tokenizer(user_path(there))
    return source


def plan_training(
    model: LanguageModel,
    data: Data,
    trainer: Trainer,
    optim: Optim,
    log: Log | None = None,
    *,
    seed: int = 0,
    target: Target | Card | Literal["trainer"] | None = "trainer",
    **others: Any,
) -> TrainingPlan:
    """Plans a training. It does not change the parts; `TrainingPlan.apply` completes them.

    Args:
        model: after `begin`.
        seed: of the initialization and dropout.
        target: the device that trains: "trainer" is the trainer's, None an unknown GPU.
        others: other arguments of the task, which change nothing.

    Raises:
        ConfigError: the parts do not fit together; the error lists every problem.
    """
    refuse(seed_problems(seed))
    devices = Devices.of(trainer)
    try:
        sizes = devices.sizes
    except ConfigError as error:
        raise error.under("trainer.strategy") from error
    accumulate, config = derived(model, data, trainer, optim, log, sizes)
    try:
        transformer = model.on_meta(config)
    except ConfigError as error:
        raise error.under("model") from error
    device, card = _device(target, trainer)
    on_gpu = device is None or device.device_type == "cuda"
    kernels = _kernels(model, transformer, data, trainer, device)
    mlp = None if device is None else choose_mlp(model, devices.precision, sizes, device, config=config)
    refuse([] if mlp is None else refused_mlp(model, mlp))
    parts = Training(model, transformer, data, devices, optim, attention.share(kernels, "flex"), device)
    whole = parts.whole_on(sizes)
    gathered = sizes.gathered(parts.counted) * ((4 if devices.precision == "32-true" else 2) + 4)
    setting = parts.setting(sizes)
    halved = halved_gradients(config, setting)
    memory, speed, in_main_memory = None, None, dict[str, float]()
    if on_gpu:
        memory, speed = memory_and_speed(parts, sizes, card)
        in_main_memory = parts.main_memory(parts.held(sizes), setting)
    short = memory is not None and card is not None and memory.fits(card.gib) != "fits"
    return TrainingPlan(
        config=config,
        parameters=sum(parts.counted.numbers.values()),
        trained=sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad),
        max_steps=int(trainer.max_steps),
        world_size=devices.gpus,
        data_parallel=sizes.data,
        micro_batch_size=data.micro_batch_size,
        accumulate_grad_batches=accumulate,
        tokens_per_step=data.global_batch_size * data.seq_length,
        attention=kernels,
        mlp=mlp,
        state_gib=(whole.state - halved + whole.offloaded) / 2**30,
        device_gib=(parts.held(sizes).state - halved + gathered) / 2**30,
        main_memory=in_main_memory,
        data=data_plan(data, trainer, vocab_size=config.vocab_size or 0, data_parallel=sizes.data),
        optimizer=optimizer_plan(optim, trainer),
        memory=memory,
        card=card,
        speed=speed,
        remedies=remedies(parts, card, speed) if short and card is not None else (),
        missing=lacking(model, data),
        # A gradient is as large as its weight.
        checkpoint_bytes=round(whole.gradients + whole.optimizer + whole.offloaded),
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
    device, card = _device(target, trainer)
    if card is None:
        raise ConfigError(Problem("gpu", None, "this machine's GPU is not known; name the one that trains", CARDS))
    if str(trainer.precision) == "32-true" or not card.flops or not card.bytes_per_s:
        given = str(trainer.precision) if card.flops else card.name
        raise ConfigError(Problem("trainer.precision" if card.flops else "gpu", given, "its speed is not worked out"))
    config = lengthened(model, data.seq_length)
    config = completed(config, data, vocabulary(config, data))
    try:
        transformer = model.on_meta(config)
    except ConfigError as error:
        raise error.under("model") from error
    calls = calls_of(model, config, data, str(trainer.precision), "auto", transformer=transformer)  # of any layout
    if device is not None:  # what a layout excludes is left out by the search
        refuse(refused_mlp(model, choose_mlp(model, str(trainer.precision), Sizes(1, 1), device, config=config)))
    by_flex = 0.0 if device is None else attention.share(attention.explain_calls(calls, device), "flex")
    return layouts(Training(model, transformer, data, Devices.of(trainer), optim, by_flex, device), card)


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
    transformer: Transformer,
    data: Data,
    trainer: Trainer,
    target: Target | None,
) -> attention.Choices:
    """The kernels that serve on `target`; empty if it is not known."""
    precision = str(trainer.precision)
    calls = calls_of(model, transformer.config, data, precision, trainer.strategy, transformer=transformer)
    try:
        if target is None:
            attention.refuse_impossible(calls)
            return ()
        return attention.choose(calls, target)
    except ConfigError as error:
        raise error.under("model.config") from error
