"""Pipeline stages: consecutive layers of a transformer that different processes run one after another."""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.lora import LoRALinear
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
        self._divisor: torch.Tensor | int = 1
        self._balance: torch.Tensor | float = 1.0

    def take(
        self,
        batches: Iterable[Mapping[str, Any]],
        divisor: torch.Tensor | int = 1,
        balance: torch.Tensor | float = 1.0,
    ) -> None:
        """Sets the batches of the next calls.

        Args:
            batches: `input_ids`, `labels`, what keeps documents apart, `padding`, and the `dropout_seed`.
            divisor: of the sum of the cross-entropy.
            balance: the factor on the balancing loss of a mixture, which the backward pass of each stage adds.
        """
        self._batches, self._divisor, self._balance = deque(batches), divisor, balance

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the previous stage, (B, T, C), to this stage's output; the first stage takes any tensor.

        The last stage returns the sum of the cross-entropy / divisor, in nats, (1,).
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
        return torch.stack([transformer.nats(transformer.final_layernorm(x), batch["labels"], self._divisor)])


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
    """The layers of a stage, of `count`.

    All stages take about the same time. The last one has fewer layers, because it has the product with the vocabulary.
    """
    first = first_layers(config, count)
    return range(first[number], first[number + 1])


def stage_of(name: str, first: tuple[int, ...]) -> int:
    """The stage with a parameter, by its name in `Transformer`; a prefix of the name is ignored.

    Of tied embeddings it is the first; the last stage has them too.

    Args:
        first: what `first_layers` returns.
    """
    if found := re.search(r"\blayers\.(\d+)\.", name):
        return bisect_right(first, int(found[1])) - 1
    return 0 if any(f"{part}." in name for part in _BEFORE) else len(first) - 2


@functools.lru_cache(maxsize=256)
def first_layers(config: TransformerConfig, count: int) -> tuple[int, ...]:
    """The first layer of each of `count` stages, and the number of layers: the slowest stage is as fast as it can be.

    Of equal ways, it is the most even one. Each stage has a layer; earlier ones, of which more micro-batches are in
    memory, have fewer.
    """
    layers, head = config.num_layers, _head(config)
    if count == 1:
        return 0, layers

    def with_last(number: int) -> list[int]:
        """The sizes of the stages if the last one has this number of layers."""
        each, more = divmod(layers - number, count - 1)
        return [each] * (count - 1 - more) + [each + 1] * more + [number]

    def times(sizes: list[int]) -> tuple[float, float]:
        *others, last = sizes
        return max(*others, last + head), sum(each**2 for each in others) + (last + head) ** 2

    best = min(map(with_last, range(1, layers - count + 2)), key=times)
    return tuple(accumulate(best, initial=0))


def _head(config: TransformerConfig) -> float:
    """How long the output layer and its loss take, in layers."""
    vocabulary = (config.vocab_size or 0) * config.hidden_size
    products = config.train_flops_per_token(config.seq_length or 0) / 6
    return max(0.0, HEAD * vocabulary * config.num_layers / max(products - vocabulary, 1.0))


HEAD = 0.75
"""The time of the output layer's operations beside that of as many in a layer, whose norms and activations wait for
memory: measured 0.69 and 0.80 on an H100, with Llama 3.2 1B and Llama 3 8B."""


def rank_of_stage(stage: int, ranks: int, folded: bool = False) -> int:
    """The rank of a pipeline that has a stage.

    Args:
        folded: whether stages go along the ranks and back, so that the first rank has the first and the last one;
            otherwise they begin again at the first rank.
    """
    turn, rank = divmod(stage, ranks)
    return ranks - 1 - rank if folded and turn % 2 else rank


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
    for module in transformer.modules():
        if isinstance(module, LoRALinear):
            module.joined = False


def refuse_stages(config: TransformerConfig, count: int) -> None:
    """Raises ConfigError if a model cannot be divided into this number of stages."""
    if config.num_layers < count:
        raise ConfigError(Problem("num_layers", config.num_layers, f"is fewer than the {count} stages; each needs one"))


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
