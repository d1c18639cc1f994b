"""Predicts the attention calls of a run's ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch

from fiddlehead.attention import AttentionSpec
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.autocast import compute_dtype
from fiddlehead.models.config import RingStep
from fiddlehead.models.parallel import first_layers, layers_of, rank_of_stage, stage_of
from fiddlehead.training.distributed.parallel import Parallel
from fiddlehead.training.language_model import LanguageModel
from fiddlehead.training.preference import PreferenceModel

TRAINING, VALIDATION, COMPARISON = "training", "validation", "comparison"
"""The passes of a run through a model: in training steps, in validation, and, for preferences, through the reference
model."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What the ranks of a run ask of attention kernels."""

    config: TransformerConfig
    dtype: torch.dtype
    seq_length: int
    packed: bool = False
    """Documents are kept apart."""
    deterministic: bool = False
    """Asked for by the trainer; what is asked for elsewhere counts anyway."""
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    stages: int = 1
    folded: bool = False
    """As `Sizes` has them."""
    ring: int = 1
    """Parts of a sequence whose keys and values go round between the ranks of `context`."""
    tiled_attention: int | None = None
    """As `LanguageModel` has it."""
    without_gradients: int = 0
    """The number of first layers before all trained parameters."""
    passes: tuple[tuple[str, bool], ...] = ((TRAINING, True),)
    """The passes, and whether the model is in training mode in each."""

    def specs(self) -> Iterator[tuple[str, AttentionSpec, tuple[int, ...], tuple[int, ...]]]:
        """Each different call: its pass, its spec, the layers that make it, and the lengths with which they do.

        In each pass, the calls on the longest sequences come first.
        """
        for name, training in self.passes:
            alike: dict[tuple[AttentionSpec, tuple[int, ...]], list[int]] = {}
            kinds: dict[tuple[tuple[int, int], bool], dict[AttentionSpec, list[int]]] = {}
            for layer in range(self.config.num_layers):
                gradients = name == TRAINING and layer >= self.without_gradients
                kind = self.config.window(layer), gradients  # all in which the calls of layers differ
                if kind not in kinds:
                    lengths = kinds[kind] = {}
                    for length in self._lengths():
                        for spec in dict.fromkeys(self._of_layer(layer, length, training, gradients)):
                            lengths.setdefault(spec, []).append(length)
                for spec, those in kinds[kind].items():
                    alike.setdefault((spec, tuple(those)), []).append(layer)
            for (spec, those), layers in sorted(alike.items(), key=lambda call: -call[0][1][0]):
                yield name, spec, tuple(layers), those

    def on_pipeline_ranks(self, layers: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """The layers of each rank of the pipeline."""
        ranks: list[list[int]] = [[] for _ in range(self.pipeline)]
        first = first_layers(self.config, self.stages)
        for layer in layers:
            stage = stage_of(f"layers.{layer}.", first)
            ranks[rank_of_stage(stage, self.pipeline, self.folded)].append(layer)
        return tuple(map(tuple, ranks))

    def _lengths(self) -> list[int]:
        """The possible lengths of a batch's longest sequence, the greatest first; `borders` rounds documents'."""
        powers = [1 << n for n in range((self.seq_length - 1).bit_length())] if self.packed else []
        return [self.seq_length, *reversed(powers)]

    def _of_layer(self, layer: int, length: int, training: bool, gradients: bool) -> Iterator[AttentionSpec]:
        """The specs of a layer's calls: one or, with a ring, one for each kind of step."""
        for step in get_args(RingStep) if self.ring > 1 else ("own",):
            yield self.config.attention_spec(
                layer,
                self.dtype,
                packed=self.packed,
                training=training,
                gradients=gradients,
                deterministic=self.deterministic,
                longest=length,
                tp=self.tensor,
                cp=self.context,
                ring=self.ring,
                step=step,
                at_a_time=self.tiled_attention,
            )


def calls_of(
    model: LanguageModel,
    config: TransformerConfig,
    data: PreTrainingDataModule | FineTuningDataModule,
    precision: str,
    strategy: object,
    *,
    deterministic: bool = False,
    transformer: Transformer | None = None,
) -> Calls:
    """What a run asks of attention kernels.

    Args:
        config: the model's complete shape.
        precision: the trainer's.
        strategy: the trainer's; all but `Parallel` leave a layer whole.
        deterministic: the trainer's setting, if the trainer, which sets PyTorch's own flag, does not exist yet.
        transformer: the complete model on the meta device, if it is at hand; otherwise it is made for adapters.

    Raises:
        ConfigError: the model's adapters match none of its layers.
    """
    passes = [(TRAINING, True)]
    if data.val_samples:
        passes.append((VALIDATION, False))
    if isinstance(model, PreferenceModel):
        passes.append((COMPARISON, model.lora is not None))  # with adapters it is the model that is trained
    split: dict[str, Any] = {}
    if isinstance(strategy, Parallel):
        ranks = strategy.pipeline_parallel
        split = {"tensor": strategy.tensor_parallel, "context": strategy.context_parallel, "pipeline": ranks}
        split["stages"] = ranks * strategy.pipeline_stages_per_rank
        split["folded"] = strategy.folded
        split["ring"] = strategy.ring_size(config)
    without = 0 if model.lora is None else _without_gradients(transformer or model.on_meta(config))
    if split.get("stages", 1) > 1:  # what a stage passes on has gradients
        without = min(without, len(layers_of(config, 0, split["stages"])))
    return Calls(
        config=config,
        dtype=compute_dtype(precision),
        seq_length=data.seq_length,
        packed=data.separate_documents,
        deterministic=deterministic,
        tiled_attention=model.computation.tiled_attention,
        without_gradients=without,
        passes=tuple(passes),
        **split,
    )


def _without_gradients(transformer: Transformer) -> int:
    """The number of first layers whose queries, keys and values no adapter changes."""
    for number, layer in enumerate(transformer.layers):
        trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        if any("linear_qkv" in name for name in trained):
            return number
        if trained:
            return number + 1
    return len(transformer.layers)
