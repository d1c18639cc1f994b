"""The decoder, for all families.

Shapes: B batch, T time, C hidden size, H query heads, G key/value heads, D head dim, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fiddlehead.attention import KVCache, attend
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.collectives import HeadExchange, SequenceSplit
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.linear import Linear, linear
from fiddlehead.models.linear_cross_entropy import linear_cross_entropy
from fiddlehead.models.moe import Experts, GroupedLinear, MoE, Sequences, activate
from fiddlehead.models.rope import Rope, Rotary, rotate
from fiddlehead.models.tiles import in_tiles


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
        self.final_layernorm = _norm(config)
        self.output_layer = None  # None: logits reuse the embedding's weights
        if not config.share_embeddings_and_output_weights:
            self.output_layer = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compiled = False
        """Whether the elementwise work on the logits is compiled into one kernel in training."""
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
        padding: torch.Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        new_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V); with labels to the sum of their cross-entropy, in nats.

        Args:
            labels: the token to predict at each place, (B, T); -100 where there is none.
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
        x = self.hidden(input_ids, cu_seqlens, max_seqlen, padding=padding, caches=caches, new_lengths=new_lengths)
        return self.logits(x) if labels is None else self.nats(x, labels)

    def hidden(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        padding: torch.Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        new_lengths: torch.Tensor | None = None,
        run_layer: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Token ids (B, T) to the last hidden states, (B, T, C); the arguments are those of `forward`.

        `run_layer`, if given, is called with each layer and its arguments and runs the layer.
        """
        places = self.places(input_ids, cu_seqlens, max_seqlen, caches, padding, new_lengths)
        x = self.embed(input_ids, places)
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

    def embed(self, input_ids: torch.Tensor, places: Places) -> torch.Tensor:
        """Token ids (B, T) to the input of the first layer, (B, T, C)."""
        config = self.config
        x = _scaled(self.embedding(input_ids), config.embedding_multiplier)
        if self.position_embedding is not None:
            if self.position_embedding.num_embeddings < places.length:
                length = self.position_embedding.num_embeddings
                message = f"the model has no position for {places.length} tokens"
                raise ConfigError(Problem("seq_length", length, message))
            x = x + self.position_embedding(self.split.own(places.positions))
        # In mixed precision too, the residual stream has the dtype of the products: half the memory to move.
        return F.dropout(x.to(product_dtype(x)), config.hidden_dropout, self.training)

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
            x = layer(*arguments) if run_layer is None else run_layer(layer, *arguments)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states, (..., C), to logits (..., V)."""
        logits = linear(x, self._output_weight())
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def nats(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum of the cross-entropy of hidden states, without all logits in memory at once."""
        return linear_cross_entropy(
            x.flatten(0, -2),
            self._output_weight(),
            labels.flatten(),
            scale=1 / self.config.logits_scaling,
            softcap=self.config.final_logit_softcapping,
            compiled=self.compiled,
        )

    def _output_weight(self) -> torch.Tensor:
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
        mixtures = [module for module in self.modules() if isinstance(module, MoE)]
        losses = [mixture.aux_loss for mixture in mixtures if mixture.aux_loss is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The names of weights that fuse several matrices, and the number of rows of each matrix."""
        rows = {}
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                H, G, D = module.config.num_attention_heads, module.config.groups, module.config.head_dim
                rows[f"{name}.linear_qkv.weight"] = (H * D, G * D, G * D)
            elif isinstance(module, MLP | Experts) and self.config.gated:
                width = module.linear_fc1.weight.shape[-2] // 2
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


class Block(nn.Module):
    """Attention, then feed-forward, each with a residual connection, and with norms before them, after them or both."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.number = layer
        self.dropout, self.multiplier = config.hidden_dropout, config.residual_multiplier
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.input_layernorm = _norm(config) if before else None
        self.self_attention = Attention(config, layer)
        self.post_attention_layernorm = _norm(config) if after else None
        self.pre_mlp_layernorm = _norm(config) if before else None
        self.mlp = MLP(config) if config.num_moe_experts is None else MoE(config)
        self.post_mlp_layernorm = _norm(config) if after else None
        self.tiled_mlp: int | None = None
        """The tokens of a tile in which the second sublayer is computed; None: it computes all tokens at once."""
        self.recomputing = False
        """Whether the layer is computed again for its backward pass, so that nobody reads its output."""

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope | None,
        documents: Documents | None,
        cache: KVCache | None = None,
        new_lengths: torch.Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.attention_sublayer(x, rope, documents, cache, new_lengths)
        if self.tiled_mlp is None:
            return self.mlp_sublayer(x, sequences)
        return in_tiles(self.mlp_sublayer, x, self.tiled_mlp, self._mlp_parameters, needed=not self.recomputing)

    def attention_sublayer(
        self,
        x: torch.Tensor,
        rope: Rope | None,
        documents: Documents | None,
        cache: KVCache | None = None,
        new_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention with its norms and its residual connection: (B, T, C) to (B, T, C)."""
        normed = x if self.input_layernorm is None else self.input_layernorm(x)
        attended = self.self_attention(normed, rope, documents, cache, new_lengths)
        return self._add(x, attended, self.post_attention_layernorm)

    def mlp_sublayer(self, x: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        """The feed-forward with its norms and its residual connection: (B, T, C) to (B, T, C)."""
        normed = x if self.pre_mlp_layernorm is None else self.pre_mlp_layernorm(x)
        served = self.mlp(normed, sequences) if isinstance(self.mlp, MoE) else self.mlp(normed)
        return self._add(x, served, self.post_mlp_layernorm)

    def _mlp_parameters(self) -> list[torch.Tensor]:
        modules = (self.pre_mlp_layernorm, self.mlp, self.post_mlp_layernorm)
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def _add(self, x: torch.Tensor, new: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        if norm is not None:
            new = norm(new)
        if self.multiplier != 1:
            new = new * self.multiplier
        return x + F.dropout(new, self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and one fused projection.

    The rows of `linear_qkv` are all query heads, then the key heads, then the value heads.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window_size = config.window(layer)
        # `parallelize` leaves a process part of the heads, and exchanges heads for whole sequences.
        self.heads, self.groups = config.num_attention_heads, config.groups
        self.exchange: HeadExchange | None = None
        H, G, D = config.num_attention_heads, config.groups, config.head_dim
        bias = config.add_bias_linear
        self.linear_qkv: nn.Linear = Linear(config.hidden_size, (H + 2 * G) * D, bias=bias or config.add_qkv_bias)
        self.linear_proj: nn.Linear = Linear(H * D, config.hidden_size, bias=bias)
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm is not None:
            whole = config.qk_layernorm == "projection"
            self.q_layernorm, self.k_layernorm = (_rms_norm(config, n * D if whole else D) for n in (H, G))
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope | None,
        documents: Documents | None,
        cache: KVCache | None = None,
        new_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        qkv = self.linear_qkv(x)
        B, T, _ = qkv.shape
        H, G, D = self.heads, self.groups, self.config.head_dim
        qk, v = qkv.view(B, T, H + 2 * G, D).split([H + G, G], dim=2)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = qk.split([H, G], dim=2)
            if self.config.qk_layernorm == "projection":
                q, k = self.q_layernorm(q.flatten(2)), self.k_layernorm(k.flatten(2))
            else:
                q, k = self.q_layernorm(q), self.k_layernorm(k)
            qk = torch.cat([q.view(B, T, H, D), k.view(B, T, G, D)], dim=2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split([H, G], dim=2)
        sinks = self.sinks
        if self.exchange is not None:
            q, k, v = self.exchange.to_heads(q, k, v)
            sinks = None if sinks is None else self.exchange.own(sinks)
        shape = q.shape
        cu_seqlens = max_seqlen = None
        if documents is not None:
            cu_seqlens, max_seqlen = documents
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = attend(
            q,
            k,
            v,
            window_size=self.window_size,
            softcap=self.config.attn_logit_softcapping or 0.0,
            sinks=sinks,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scale=self.config.softmax_scale,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=max_seqlen,
            kv_cache=cache,
            new_lengths=new_lengths,
            backend=self.config.attention_backend,
        )
        if self.exchange is not None:
            out = self.exchange.to_sequence(out.reshape(shape))
        return self.linear_proj(out.reshape(B, T, H * D))


class MLP(nn.Module):
    """Feed-forward. With a gate, `linear_fc1` fuses the gate's projection and the other one, gate first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        width = 2 * config.ffn_size if config.gated else config.ffn_size
        self.linear_fc1: nn.Linear = Linear(config.hidden_size, width, bias=config.add_bias_linear)
        self.linear_fc2: nn.Linear = Linear(config.ffn_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.linear_fc2(activate(self.linear_fc1(x), self.activation))


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019). The input may be narrower than the weight, as in mixed precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same, in x's dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)  # autocast would leave it in float32


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm that multiplies by 1 + weight, so weight decay moves the factor towards 1."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same, in float32 inside: 1 + weight would lose what bfloat16 holds near 0."""
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class Documents(NamedTuple):
    """Where the documents in a batch begin and end."""

    cu_seqlens: torch.Tensor
    max_seqlen: int | None


class Places(NamedTuple):
    """Where the tokens of a batch stand."""

    positions: torch.Tensor
    """Positions in the sequence or document, (T,) or (B, T), of whole sequences."""
    length: int
    """A length above all positions."""
    lengths: torch.Tensor | None
    """The length of each position's sequence or document, (B, T), where the result depends on it."""
    documents: Documents | None
    sequences: Sequences | None = None
    """The tokens over which the balancing loss is taken; None without that loss."""


def documents_of(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The index of each token's document, (tokens,) int64."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, token, right=True) - 1


def positions_in_documents(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The position of each token in its own document, (tokens,)."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return token - cu_seqlens[documents_of(cu_seqlens, tokens)]


def _scaled(x: torch.Tensor, multiplier: float) -> torch.Tensor:
    """x times the multiplier in x's dtype, as models with a multiplier were trained."""
    return x if multiplier == 1 else x * torch.tensor(multiplier, dtype=x.dtype).item()


def _norm(config: TransformerConfig) -> nn.Module:
    if config.normalization == "LayerNorm":
        return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return _rms_norm(config, config.hidden_size)


def _rms_norm(config: TransformerConfig, size: int) -> nn.Module:
    kind = ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
    return kind(size, eps=config.layernorm_epsilon)


def _position_embedding(config: TransformerConfig) -> nn.Embedding | None:
    if config.position_embedding_type != "learned_absolute":
        return None
    if config.seq_length is None:
        raise ConfigError(Problem("seq_length", None, "learned positions need their number"))
    return nn.Embedding(config.seq_length, config.hidden_size)
