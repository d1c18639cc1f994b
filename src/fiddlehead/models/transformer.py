"""The decoder, for all families.

Shapes: B batch, T time, C hidden size, H query heads, G key/value heads, D head dim, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from fiddlehead.attention import KVCache
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.block import MLP, Attention, Block
from fiddlehead.models.collectives import SequenceSplit
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.linear import Linear, linear
from fiddlehead.models.linear_cross_entropy import linear_cross_entropy
from fiddlehead.models.moe import Experts, GroupedLinear, MoE, Sequences
from fiddlehead.models.nf4 import is_quantized
from fiddlehead.models.norms import norm
from fiddlehead.models.places import Documents, Places, documents_of, positions_in_documents
from fiddlehead.models.rope import Rope, Rotary
from fiddlehead.models.tied_embedding import TiedLookup

Lookup = Callable[[torch.Tensor], torch.Tensor]


class Transformer(nn.Module):
    """A decoder-only transformer: tokens in, next-token logits out."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocates and initializes the parameters on the default device.

        Raises:
            ConfigError: `vocab_size` is None, or `seq_length` is and the positions are learned.
        """
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError(Problem("vocab_size", None, "a model needs the size of its vocabulary"))
        self.config = config
        self.split = SequenceSplit()  # `parallelize` says which part of each sequence this process has
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _position_embedding(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = norm(config)
        self.output_layer = None  # None: logits reuse the embedding's weights
        if not config.share_embeddings_and_output_weights:
            self.output_layer = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout_seed: int | None = None
        """Seeds what the next forward pass drops, each layer by itself; None: it depends on PyTorch's generator."""
        self.compiled = False
        """Whether the elementwise work on the logits is compiled into one kernel in training."""
        self.joins_gradients = config.share_embeddings_and_output_weights
        """Whether the embedding and the output layer, if they share a weight, add their gradients in place."""
        self.activation_memory_budget: float | None = None
        """The part of the activations that the compiler may keep for the backward pass; None: the compiler decides."""
        self.initialize()

    def forward(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        labels: torch.Tensor | None = None,
        divisor: torch.Tensor | int = 1,
        padding: torch.Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        new_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V); with labels to the sum of their cross-entropy / divisor, in nats.

        Args:
            labels: the token to predict at each place, (B, T); -100 where there is none.
            divisor: as in `linear_cross_entropy`, for which it is faster than to divide later.
            padding: which tokens are padding, (B, T) bool: `aux_loss` ignores them. None: there is no padding.
            cu_seqlens: keeps documents apart: the start of each document among the B x T tokens, and the end of the
                last, (N + 1,) int32. A token sees only its own document, and its position is the one in the document.
                Documents may be empty.
            max_seqlen: at least the length of the longest document; needed with `cu_seqlens`.
            caches: one for each layer; they hold the earlier tokens, and these are appended. Not with `cu_seqlens`.
            new_lengths: how many of the T tokens each sequence has, (B,); the rest, on the right, is padding. Caches
                keep only these tokens, as in `attend`.

        Raises:
            ConfigError: a sequence in the caches becomes too long for LongRoPE's short factors: its cached keys were
                rotated with these and must be computed again.
        """
        weight, lookup = self.output_weight, None
        learns = labels is not None and weight.requires_grad and torch.is_grad_enabled()
        hooks = self.embedding._forward_hooks or self.embedding._forward_pre_hooks  # which a lookup would not call
        if self.joins_gradients and learns and not hooks:
            lookup = TiedLookup(weight)
        x = self.hidden(
            input_ids,
            cu_seqlens,
            max_seqlen,
            padding=padding,
            caches=caches,
            new_lengths=new_lengths,
            lookup=lookup,
        )
        if labels is None:
            return self.logits(x)
        return self.nats(x, labels, divisor, weight if lookup is None else lookup.weight)

    def hidden(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        padding: torch.Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        new_lengths: torch.Tensor | None = None,
        lookup: Lookup | None = None,
        run_layer: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Token ids (B, T) to the last hidden states, (B, T, C); the arguments are those of `forward`.

        `lookup`, if given, is called in the place of the embedding. `run_layer`, if given, is called with each layer
        and its arguments and runs the layer.
        """
        places = self.places(input_ids, cu_seqlens, max_seqlen, caches, padding, new_lengths)
        x = self.embed(input_ids, places, lookup)
        kept = None if caches is None else new_lengths
        x = self.run_layers(self.layers, x, places, caches=caches, new_lengths=kept, run_layer=run_layer)
        return self.final_layernorm(x)

    def places(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        caches: Sequence[KVCache] | None = None,
        padding: torch.Tensor | None = None,
        new_lengths: torch.Tensor | None = None,
    ) -> Places:
        """The positions of the whole sequences that contain this process's `input_ids`; arguments as in `forward`."""
        split = self.split
        T = split.parts * input_ids.shape[1]
        of_each = self.config.longrope_length is not None
        if caches is not None:
            if split.parts > 1:
                raise ConfigError(
                    Problem("caches", message="a model whose sequences are split over processes has no caches")
                )
            cache = caches[0]
            lengths = self._lengths_in_cache(cache, T, new_lengths) if of_each else None
            return Places(cache.next_positions(T), T + cache.length, lengths, None)
        balanced = self.training and self.config.num_moe_experts is not None and self.config.moe_aux_loss_coeff > 0
        padding = None if padding is None else padding.flatten().logical_not()
        if cu_seqlens is not None:
            number = documents_of(cu_seqlens, split.parts * input_ids.numel()).view(-1, T)
            positions = positions_in_documents(cu_seqlens, split.parts * input_ids.numel()).view(-1, T)
            lengths = cu_seqlens.diff()[number] if of_each else None
            documents = Documents(cu_seqlens, max_seqlen)
            sequences = Sequences(split.own(number).flatten(), len(cu_seqlens) - 1, padding) if balanced else None
            return Places(positions, min(max_seqlen or T, T), lengths, documents, sequences)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        lengths = new_lengths[:, None].expand(-1, T) if of_each and new_lengths is not None else None
        sequences = Sequences(rows.repeat_interleave(input_ids.shape[1]), len(rows), padding) if balanced else None
        return Places(torch.arange(T, device=input_ids.device), T, lengths, None, sequences)

    def _lengths_in_cache(self, cache: KVCache, T: int, new_lengths: torch.Tensor | None) -> torch.Tensor:
        """The length that each sequence reaches with the T new tokens, (B, T)."""
        before = cache.lengths
        after = before + (T if new_lengths is None else new_lengths)
        limit = self.config.longrope_length or 0
        # The device is asked only where the longest sequence may be one that grows beyond the limit.
        if cache.length and cache.length + T > limit:
            crossing = (before > 0) & (before <= limit) & (after > limit)
            if bool(crossing.any()):
                message = (
                    f"a sequence grows beyond old_context_len={limit}, where LongRoPE has other factors for all of its "
                    "keys; pass the whole sequence with empty caches"
                )
                raise ConfigError(Problem("caches", message=message))
        return after[:, None].expand(-1, T)

    def embed(self, input_ids: torch.Tensor, places: Places, lookup: Lookup | None = None) -> torch.Tensor:
        """Token ids (B, T) to the input of the first layer, (B, T, C); `lookup` as in `hidden`."""
        config = self.config
        x = self.embed_tokens(input_ids, lookup)
        if self.position_embedding is not None:
            if self.position_embedding.num_embeddings < places.length:
                length = self.position_embedding.num_embeddings
                message = f"the model has no position for {places.length} tokens"
                raise ConfigError(Problem("seq_length", length, message))
            x = x + self.position_embedding(self.split.own(places.positions))
        self._seed_dropout(0)
        # In mixed precision too, the residual stream has the dtype of the products: half the memory to move.
        return self.split.dropout(x.to(product_dtype(x)), config.hidden_dropout, self.training)

    def embed_tokens(self, input_ids: torch.Tensor, lookup: Lookup | None = None) -> torch.Tensor:
        """Token ids (...) to their embeddings, (..., C), without positions; `lookup` as in `hidden`."""
        return _scaled((lookup or self.embedding)(input_ids), self.config.embedding_multiplier)

    def run_layers(
        self,
        layers: Iterable[nn.Module],
        x: torch.Tensor,
        places: Places,
        *,
        caches: Sequence[KVCache] | None = None,
        new_lengths: torch.Tensor | None = None,
        run_layer: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Runs `layers` of this model: the input of the first to the output of the last, both (B, T, C)."""
        config = self.config
        ropes: dict[Rotary, Rope] = {}
        if config.position_embedding_type == "rope":
            kinds = dict.fromkeys(config.rotary(layer) for layer in range(config.num_layers))
            positions = self.split.gathered(places.positions)
            lengths = places.length if places.lengths is None else self.split.gathered(places.lengths)
            ropes = {rotary: rotary.tables(positions, lengths) for rotary in kinds}
        for layer in layers:
            number: int = layer.number  # type: ignore[assignment]
            rope = ropes[config.rotary(number)] if ropes else None
            cache = None if caches is None else caches[number]
            arguments = x, rope, places.documents, cache, new_lengths, places.sequences
            self._seed_dropout(1 + number)
            x = layer(*arguments) if run_layer is None else run_layer(layer, *arguments)
        return x

    def _seed_dropout(self, place: int) -> None:
        # Each layer has a seed of its own, so that what it drops does not depend on where the others are computed.
        if self.dropout_seed is not None and self.training:
            torch.manual_seed(hash((self.dropout_seed, place)) % 2**63)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states, (..., C), to logits (..., V)."""
        return self.capped(linear(x, self.output_weight))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Products with the output layer's weights to logits: scaled and capped as the config says."""
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def nats(
        self,
        x: torch.Tensor,
        labels: torch.Tensor,
        divisor: torch.Tensor | int = 1,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum of the cross-entropy of hidden states / divisor, without all logits in memory at once.

        `weight`, if given, stands for `output_weight`.
        """
        return linear_cross_entropy(
            x.flatten(0, -2),
            self.output_weight if weight is None else weight,
            labels.flatten(),
            scale=1 / self.config.logits_scaling,
            softcap=self.config.final_logit_softcapping,
            compiled=self.compiled,
            divisor=divisor,
        )

    @property
    def output_weight(self) -> torch.Tensor:
        """(V, C); the embedding's, if the two share it."""
        return (self.embedding if self.output_layer is None else self.output_layer).weight

    def aux_loss(self) -> torch.Tensor | None:
        """The balancing loss of the latest forward pass in training, summed over tokens; None if there is none.

        It is Megatron's `seq_aux_loss`. For one layer and one sequence of n tokens it is n x `moe_aux_loss_coeff` x
        E x the sum over the E experts of f x P: f is the part of the sequence's n x `moe_router_topk` assignments that
        an expert has, and P the mean over the tokens of its probability, a softmax over all experts. With an even load
        that is n x `moe_aux_loss_coeff`. All layers are added up. A sequence is a row or, where documents are kept
        apart, a document; padding is not part of it. As a sum over sequences it does not depend on how they are split
        into batches. Of a sequence that processes share each returns the part of its own tokens.
        """
        return balancing_loss(self.layers)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The names of weights that fuse several matrices, and the rows of each, in the whole weights; none in NF4."""
        rows = {}
        for name, module in self.named_modules():
            if isinstance(module, Attention) and not is_quantized(module.linear_qkv.weight):
                H, G, D = module.config.num_attention_heads, module.config.groups, module.config.head_dim
                rows[f"{name}.linear_qkv.weight"] = (H * D, G * D, G * D)
            elif isinstance(module, MLP | Experts) and self.config.gated and not is_quantized(module.linear_fc1.weight):
                width = self.config.ffn_size if isinstance(module, MLP) else self.config.expert_size
                rows[f"{name}.linear_fc1.weight"] = (width, width)
        return rows

    @torch.no_grad()
    def initialize(self) -> None:
        """Initializes the weights: normal with `init_method_std`; layers' outputs are scaled down with depth.

        The scaling by 1 / sqrt(2 x num_layers) is GPT-2's (Radford et al. 2019), as in Megatron.
        """
        std = self.config.init_method_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | GroupedLinear):
                scaled = name.endswith(("linear_proj", "linear_fc2"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_layers) if scaled else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)


def balancing_loss(layers: Iterable[nn.Module]) -> torch.Tensor | None:
    """The result of `Transformer.aux_loss` for some layers."""
    mixtures = [module for layer in layers for module in layer.modules() if isinstance(module, MoE)]
    losses = [mixture.aux_loss for mixture in mixtures if mixture.aux_loss is not None]
    return sum(losses[1:], losses[0]) if losses else None


def _scaled(x: torch.Tensor, multiplier: float) -> torch.Tensor:
    """x times the multiplier in x's dtype, as models with a multiplier were trained."""
    return x if multiplier == 1 else x * torch.tensor(multiplier, dtype=x.dtype).item()


def _position_embedding(config: TransformerConfig) -> nn.Embedding | None:
    if config.position_embedding_type != "learned_absolute":
        return None
    if config.seq_length is None:
        raise ConfigError(Problem("seq_length", None, "learned positions need their number"))
    return nn.Embedding(config.seq_length, config.hidden_size)
