"""Pipeline stages: consecutive layers of a transformer that different processes run one after another."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fiddlehead.errors import Problem, refuse
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.transformer import Transformer


class Stage(nn.Module):
    """Some of a transformer's modules: the first stage has the embedding, the last the loss.

    All processes have the whole batch; only the outputs of layers travel between them.

    Args:
        number: the index of this stage, of `count` in all.
    """

    def __init__(self, transformer: Transformer, number: int, count: int) -> None:
        super().__init__()
        self.number, self.first, self.last = number, number == 0, number == count - 1
        self._transformer = [transformer]  # in a list, so that it is not part of this module
        children = dict(transformer.layers.named_children())
        self.layers = nn.ModuleList(children[str(layer)] for layer in layers_of(transformer.config, number, count))
        for name in (_BEFORE if self.first else ()) + (_AFTER if self.last else ()):
            self.add_module(name, getattr(transformer, name))
        self._batches: deque[Mapping[str, Any]] = deque()

    def take(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Sets the batches of the next calls: `input_ids`, `labels` and the fields that keep documents apart."""
        self._batches = deque(batches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the previous stage, (B, T, C), to this stage's output; the first stage takes any tensor.

        The last stage returns the sum of the cross-entropy, in nats, (1,).
        """
        transformer, batch = self._transformer[0], self._batches.popleft()
        places = transformer.places(batch["input_ids"], batch.get("cu_seqlens"), batch.get("max_seqlen"))
        if self.first:
            x = transformer.embed(batch["input_ids"], places)
        x = transformer.run_layers(self.layers, x, places)
        if not self.last:
            return x
        return torch.stack([transformer.nats(transformer.final_layernorm(x), batch["labels"])])


def layers_of(config: TransformerConfig, number: int, count: int) -> range:
    """The layers of a stage."""
    each = config.num_layers // count
    return range(number * each, (number + 1) * each)


def stage_of(name: str, config: TransformerConfig, count: int) -> int:
    """The stage, of `count`, with a parameter, by its name in `Transformer`; a prefix of the name is ignored."""
    if found := re.search(r"\blayers\.(\d+)\.", name):
        return int(found[1]) // (config.num_layers // count)
    return 0 if any(f"{part}." in name for part in _BEFORE) else count - 1


def keep_stages(transformer: Transformer, numbers: Iterable[int], count: int) -> None:
    """Reduces a transformer, in place, to the parameters of some of `count` stages; names do not change.

    Raises:
        ConfigError: the model cannot be divided in this way.
    """
    config, numbers = transformer.config, set(numbers)
    refuse_stages(config, count)
    kept = {layer for number in numbers for layer in layers_of(config, number, count)}
    for layer in set(range(config.num_layers)) - kept:
        delattr(transformer.layers, str(layer))  # the others keep their names, which `del layers[...]` would change
    for name in (() if 0 in numbers else _BEFORE) + (() if count - 1 in numbers else _AFTER):
        setattr(transformer, name, None)


def refuse_stages(config: TransformerConfig, count: int) -> None:
    """Raises ConfigError if a model cannot be divided into this number of stages."""
    problems = []
    if config.num_layers % count:
        message = f"{count} stages do not divide it"
        allowed = [n for n in range(1, config.num_layers + 1) if config.num_layers % n == 0]
        problems.append(Problem("num_layers", config.num_layers, message, allowed))
    if count > 1:
        if config.share_embeddings_and_output_weights:
            problems.append(
                Problem("share_embeddings_and_output_weights", True, "the first and the last stage cannot share them")
            )
        if config.num_moe_experts is not None and config.moe_aux_loss_coeff:
            problems.append(
                Problem("moe_aux_loss_coeff", config.moe_aux_loss_coeff, "only the last stage adds to the loss", (0,))
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if value := getattr(config, name):
                problems.append(Problem(name, value, "stages would drop other values than a single process", (0,)))
    refuse(problems)


_BEFORE = ("embedding", "position_embedding")
"""The modules of the first stage besides layers."""
_AFTER = ("final_layernorm", "output_layer")
"""The modules of the last stage besides layers."""
