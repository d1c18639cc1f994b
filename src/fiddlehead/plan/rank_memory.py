"""The memory and the speed of a training, from its parts: what `memory` and `speed` are asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from fiddlehead.attention import Target
from fiddlehead.models import Transformer, nf4
from fiddlehead.models.lora import LoRALinear
from fiddlehead.plan.activations import Setting
from fiddlehead.plan.cards import Card
from fiddlehead.plan.memory import Held, Memory, main_memory, memory
from fiddlehead.plan.speed import Speed, speed
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from fiddlehead.training.bfloat16_gradients import makes_bfloat16_gradients
from fiddlehead.training.distributed.sizes import Counted, Sizes
from fiddlehead.training.feed_forward import choose_mlp
from fiddlehead.training.frozen import halves_frozen
from fiddlehead.training.optim import AdamW, Optim

OFFLOADED = "optim.state_offloading=true"
"""The edit of a recipe that makes `Training.offloaded`."""


@dataclass(frozen=True)
class Devices:
    """What memory and speed need of a trainer, under its names; a search tries others than the trainer has."""

    strategy: Any
    precision: str
    num_devices: int
    num_nodes: int

    @classmethod
    def of(cls, trainer: Trainer) -> Devices:
        """Those of a trainer."""
        return cls(trainer.strategy, str(trainer.precision), trainer.num_devices, trainer.num_nodes)

    @property
    def gpus(self) -> int:
        """How many there are on all nodes."""
        return self.num_devices * self.num_nodes

    @property
    def cut(self) -> bool:
        """Whether parameters are cut over them."""
        return isinstance(self.strategy, Parallel) and self.gpus > 1

    @property
    def sizes(self) -> Sizes:
        """Of the ranks; those without `Parallel` are copies."""
        return self.strategy.sizes(self.gpus) if isinstance(self.strategy, Parallel) else Sizes(self.gpus, self.gpus)


@dataclass(frozen=True)
class Training:
    """The parts of a training."""

    model: LanguageModel
    transformer: Transformer
    """The complete model, on the meta device."""
    data: Any
    devices: Devices
    optim: Optim
    by_flex: float = 0.0
    """As `Setting.by_flex`."""
    target: Target | None = None
    """The GPU; None: its kernels are not known."""

    @cached_property
    def counted(self) -> Counted:
        """The model's parameters, by their places."""
        return Counted.of(self.transformer)

    @property
    def quantizes(self) -> bool:
        """Whether the frozen weights are in NF4."""
        return self.model.lora is not None and self.model.lora.quantize_base is not None

    @cached_property
    def adapted(self) -> int:
        """As `Setting.adapted`."""
        if self.model.lora is None:
            return 0
        layers = [module for module in self.transformer.modules() if isinstance(module, LoRALinear)]
        return sum(layer.in_features + layer.out_features for layer in layers)

    @property
    def offloads_state(self) -> bool:
        """Whether the optimizer's state is in main memory; optimizers that others wrote may have no such field."""
        return bool(getattr(self.optim, "state_offloading", False))

    def offloaded(self) -> Training | None:
        """The training with the optimizer's state in main memory; None if it is there, or cannot be."""
        optim = self.optim
        if not isinstance(optim, AdamW) or optim.state_bits != 32 or optim.state_offloading:
            return None
        return replace(self, optim=replace(optim, state_offloading=True))

    @cached_property
    def trained(self) -> Counted:
        """Those that are trained."""
        return Counted.of(self.transformer, trained=True)

    @cached_property
    def _quantized(self) -> int:
        """How many weights are in NF4."""
        return sum(linear.weight.numel() for linear in nf4.quantizable(self.transformer).values()) * self.quantizes

    @cached_property
    def _frozen(self) -> int:
        """How many others are not trained."""
        return sum(self.counted.numbers.values()) - sum(self.trained.numbers.values()) - self._quantized

    @cached_property
    def whole(self) -> Held:
        """What a rank has that holds all parameters."""
        devices, optim = self.devices, self.optim
        learned = [(name, each) for name, each in self.transformer.named_parameters() if each.requires_grad]
        each = 2 if devices.precision == "bf16-true" else 4
        number = sum(self.counted.numbers.values())
        trained = number - self._frozen - self._quantized
        reference = each * number if isinstance(self.model, PreferenceModel) and self.model.lora is None else 0
        halved = halves_frozen(self.model, devices.precision, fsdp=devices.cut)
        frozen = self._frozen * (2 if halved else each) + self._quantized * nf4.BITS / 8
        copied = isinstance(devices.strategy, DDPStrategy) and devices.gpus > 1
        operations, moved = optim.step_work(learned)
        state, offloads = optim.state_bytes(learned, devices.precision), self.offloads_state
        return Held(
            parameters=frozen + each * trained + reference,
            gradients=each * trained,
            optimizer=0 if offloads else state,
            offloaded=state if offloads else 0,
            stepping=optim.step_bytes(learned, devices.precision),
            buckets=each * trained if copied else 0.0,
            step_operations=operations,
            step_moved=moved,
        )

    def whole_on(self, sizes: Sizes) -> Held:
        """The same on ranks of these sizes: where FSDP2 does not have them, frozen weights may be in bfloat16."""
        cut, precision = self.devices.cut, self.devices.precision
        if cut and not sizes.fsdp and halves_frozen(self.model, precision, fsdp=False):
            return replace(self.whole, parameters=self.whole.parameters - 2 * self._frozen)
        return self.whole

    def held(self, sizes: Sizes) -> Held:
        """What the rank has of the parameters that has the most of them."""
        whole = self.whole_on(sizes)
        share, trained = (sizes.held(each) / sum(each.numbers.values()) for each in (self.counted, self.trained))
        return replace(
            whole,
            parameters=share * whole.parameters,
            gradients=trained * whole.gradients,
            optimizer=trained * whole.optimizer,
            offloaded=trained * whole.offloaded,
            stepping=whole.stepping * (1 if self.optim.takes_whole_matrices or self.offloads_state else trained),
            step_operations=whole.step_operations / sizes.pipeline,
            step_moved=whole.step_moved / sizes.pipeline,
        )

    def setting(self, sizes: Sizes, micro_batches: int | None = None) -> Setting:
        """How the ranks train; with this number of micro-batches, or as many as the data says."""
        model, data, computation = self.model, self.data, self.model.computation
        strategy = self.devices.strategy if isinstance(self.devices.strategy, Parallel) else Parallel()
        dense = self.transformer.config.num_moe_experts is None
        return Setting(
            tokens=data.micro_batch_size * data.seq_length,
            sequences=data.micro_batch_size,
            precision=self.devices.precision,
            compiled=computation.compile is not None,
            recompute=computation.activation_checkpointing,
            fp8=computation.fp8 is not None,
            # Of a mixture only attention's weights are: all are counted as if none were.
            fp8_all_gather=computation.fp8_all_gather and self.devices.cut and dense,
            tiled_mlp=computation.tiled_mlp,
            tiled_attention=computation.tiled_attention,
            offloads=computation.activation_offloading,
            micro_batches=micro_batches or data.accumulate_grad_batches(sizes.data),
            adapters=model.lora is not None,
            rank=0 if model.lora is None else model.lora.rank,
            adapted=self.adapted,
            compares=isinstance(model, PreferenceModel),
            quantizes=self.quantizes,
            sizes=sizes if self.devices.cut else None,
            reshard_after_forward=strategy.reshard_after_forward,
            overlaps=self._overlaps(strategy, sizes),
            ring=strategy.ring_size(self.transformer.config),
            schedule=strategy.pipeline_schedule,
            by_flex=self.by_flex,
            fuses=self._fuses(sizes),
            bfloat16_gradients=makes_bfloat16_gradients(
                model,
                self.optim,
                precision=self.devices.precision,
                strategy=self.devices.strategy,
                devices=self.devices.gpus,
            ),
            joins=computation.compile != "model" and not isinstance(model, PreferenceModel),
        )

    def _overlaps(self, strategy: Parallel, sizes: Sizes) -> bool:
        on_gpus = self.target is not None and self.target.device_type == "cuda"
        return on_gpus and strategy.tensor_parallel_overlap and self.devices.num_devices % sizes.tensor == 0

    def _fuses(self, sizes: Sizes) -> bool:
        if self.target is None:
            return False
        config, precision = self.transformer.config, self.devices.precision
        return choose_mlp(self.model, precision, sizes, self.target, config=config).backend != "torch"

    def memory(self, held: Held, setting: Setting) -> Memory:
        """The memory of the GPU that has the most."""
        return memory(self.transformer.config, held, setting)

    def main_memory(self, held: Held, setting: Setting) -> dict[str, float]:
        """What is in main memory instead of on the GPU, in words, and its bytes."""
        return main_memory(self.transformer.config, held, setting)

    def speed(self, held: Held, setting: Setting, card: Card) -> Speed | None:
        """How fast such cards train; None if that is not known."""
        config, devices = self.transformer.config, self.devices
        each = {"gpus": devices.gpus, "gpus_per_node": devices.num_devices}
        return speed(config, held, setting, card, self.data.seq_length, **each)


def memory_and_speed(training: Training, sizes: Sizes, card: Card | None) -> tuple[Memory | None, Speed | None]:
    """The memory of the GPU that has the most, and how fast such cards train; None if the card is not known.

    Args:
        sizes: of the ranks.
    """
    held, setting = training.held(sizes), training.setting(sizes)
    return training.memory(held, setting), card and training.speed(held, setting, card)
