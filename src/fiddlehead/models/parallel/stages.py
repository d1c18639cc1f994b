"""Pipeline stages: consecutive layers of a transformer that different processes run one after another."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.transformer import Transformer, balancing_loss


class Stage(nn.Module):
    """Some of a transformer's modules: the first stage has the embedding, the last the loss; tied weights are in both.

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
        for name in sorted(_outside_layers(transformer.config, number, count)):
            self.add_module(name, getattr(transformer, name))
        self._batches: deque[Mapping[str, Any]] = deque()
        self._balance: torch.Tensor | float = 1.0

    def take(self, batches: Iterable[Mapping[str, Any]], balance: torch.Tensor | float = 1.0) -> None:
        """Sets the batches of the next calls.

        Args:
            batches: `input_ids`, `labels`, what keeps documents apart, `padding`, and the `dropout_seed`.
            balance: the factor on the balancing loss of a mixture, which the backward pass of each stage adds.
        """
        self._batches, self._balance = deque(batches), balance

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the previous stage, (B, T, C), to this stage's output; the first stage takes any tensor.

        The last stage returns the sum of the cross-entropy, in nats, (1,).
        """
        transformer, batch = self._transformer[0], self._batches.popleft()
        documents = batch.get("cu_seqlens"), batch.get("max_seqlen")
        places = transformer.places(batch["input_ids"], *documents, padding=batch.get("padding"))
        transformer.dropout_seed = batch.get("dropout_seed")
        if self.first:
            x = transformer.embed(batch["input_ids"], places)
        x = transformer.run_layers(self.layers, x, places)
        balance = balancing_loss(self.layers)
        if balance is not None:
            x = _WithLoss.apply(x, balance * self._balance)
        if not self.last:
            # The schedule has a backward pass for every stage, also for a first one in which nothing is trained.
            return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()
        return torch.stack([transformer.nats(transformer.final_layernorm(x), batch["labels"])])


class _WithLoss(torch.autograd.Function):
    """Returns x; the backward pass is also that of a loss, which does not travel to the last stage."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.one = torch.ones_like(loss)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], ctx.one


def layers_of(config: TransformerConfig, number: int, count: int) -> range:
    """The layers of a stage."""
    each = config.num_layers // count
    return range(number * each, (number + 1) * each)


def stage_of(name: str, config: TransformerConfig, count: int) -> int:
    """The stage, of `count`, with a parameter, by its name in `Transformer`; a prefix of the name is ignored.

    Of tied embeddings it is the first; the last stage has them too.
    """
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
    outside = {name for number in numbers for name in _outside_layers(config, number, count)}
    for name in {*_BEFORE, *_AFTER} - outside:
        setattr(transformer, name, None)


def refuse_stages(config: TransformerConfig, count: int) -> None:
    """Raises ConfigError if a model cannot be divided into this number of stages."""
    if config.num_layers % count:
        message = f"{count} stages do not divide it"
        allowed = [n for n in range(1, config.num_layers + 1) if config.num_layers % n == 0]
        raise ConfigError(Problem("num_layers", config.num_layers, message, allowed))


def is_tied(name: str, config: TransformerConfig) -> bool:
    """Whether the first and the last of several stages have a parameter; a prefix of its name is ignored."""
    return config.share_embeddings_and_output_weights and f".{name}".endswith(".embedding.weight")


def _outside_layers(config: TransformerConfig, number: int, count: int) -> set[str]:
    """The modules of a stage besides layers."""
    names = {*(_BEFORE if number == 0 else ()), *(_AFTER if number == count - 1 else ())}
    return names | {"embedding"} if config.share_embeddings_and_output_weights and number == count - 1 else names


_BEFORE = ("embedding", "position_embedding")
"""The modules of the first stage besides layers."""
_AFTER = ("final_layernorm", "output_layer")
"""The modules of the last stage besides layers."""
