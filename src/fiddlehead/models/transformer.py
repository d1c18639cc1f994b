"""One decoder for every dense family.

Shapes: B batch, T time, C hidden size, H query heads, G key/value heads, D head dim, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fiddlehead.attention import attend
from fiddlehead.errors import ConfigError
from fiddlehead.models.config import TransformerConfig


class Transformer(nn.Module):
    """A decoder-only transformer: tokens in, next-token logits out."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocates and initializes the parameters on the default device.

        Raises:
            ConfigError: `vocab_size` is None, or `seq_length` is and the positions are learned.
        """
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("vocab_size=None: a model needs to know its vocabulary")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _position_embedding(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = _norm(config)
        self.output_layer = None  # None: logits reuse the embedding's weights
        if not config.share_embeddings_and_output_weights:
            self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialize()

    def forward(
        self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None
    ) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V).

        Args:
            cu_seqlens: keeps documents apart: where each begins among the B x T tokens, and the end of the last,
                (N + 1,) int32. A token sees its own document only, and its position is that in the document. Empty
                documents may be among them.
            max_seqlen: at least the length of the longest document; needed with `cu_seqlens`.
        """
        T = input_ids.shape[1]
        documents = None
        positions = torch.arange(T, device=input_ids.device)
        if cu_seqlens is not None:
            documents = Documents(cu_seqlens, max_seqlen)
            positions = positions_in_documents(cu_seqlens, input_ids.numel()).view_as(input_ids)
        x = self.embedding(input_ids)
        rope = None
        if self.position_embedding is not None:
            if self.position_embedding.num_embeddings < T:
                raise ConfigError(
                    f"seq_length={self.position_embedding.num_embeddings}: the model has no position for {T} tokens"
                )
            x = x + self.position_embedding(positions)
        elif self.config.position_embedding_type == "rope":
            rope = rotary_tables(positions, self.config)
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        for layer in self.layers:
            x = layer(x, rope, documents)
        x = self.final_layernorm(x)
        head = self.embedding if self.output_layer is None else self.output_layer
        return F.linear(x, head.weight)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws the weights anew: normal with `init_method_std`, the layers' outputs scaled down with depth.

        The scaling by 1 / sqrt(2 x num_layers) is GPT-2's (Radford et al. 2019), as in Megatron.
        """
        std = self.config.init_method_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scaled = name.endswith(("linear_proj", "linear_fc2"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_layers) if scaled else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)


class Block(nn.Module):
    """Attention, then feed-forward, each normalized before and added to the stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = _norm(config)
        self.self_attention = Attention(config, layer)
        self.pre_mlp_layernorm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope: Rope | None, documents: Documents | None) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        attended = self.self_attention(self.input_layernorm(x), rope, documents)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.pre_mlp_layernorm(x)), self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and one fused projection.

    The rows of `linear_qkv` are all query heads, then the key heads, then the value heads.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window_size = config.window(layer)
        H, G, D = config.num_attention_heads, config.groups, config.head_dim
        bias = config.add_bias_linear
        self.linear_qkv = nn.Linear(config.hidden_size, (H + 2 * G) * D, bias=bias or config.add_qkv_bias)
        self.linear_proj = nn.Linear(H * D, config.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor, rope: Rope | None, documents: Documents | None) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        B, T, _ = x.shape
        H, G, D = self.config.num_attention_heads, self.config.groups, self.config.head_dim
        qk, v = self.linear_qkv(x).view(B, T, H + 2 * G, D).split([H + G, G], dim=2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split([H, G], dim=2)
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
            dropout=self.config.attention_dropout if self.training else 0.0,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=max_seqlen,
            backend=self.config.attention_backend,
        )
        return self.linear_proj(out.reshape(B, T, H * D))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020) with gate and up projection fused in `linear_fc1`, gate first; or GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        width = 2 * config.ffn_size if self.gated else config.ffn_size
        self.linear_fc1 = nn.Linear(config.hidden_size, width, bias=config.add_bias_linear)
        self.linear_fc2 = nn.Linear(config.ffn_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.linear_fc1(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.linear_fc2(F.silu(gate) * up)
        return self.linear_fc2(F.gelu(x, approximate="tanh"))


Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of each position's angles, (T, 1, D / 2) or (B, T, 1, D / 2) each, float32."""


class Documents(NamedTuple):
    """Where the documents in a batch begin and end."""

    cu_seqlens: torch.Tensor
    max_seqlen: int | None


def positions_in_documents(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """How many tokens of its own document come before each token, (tokens,)."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return token - cu_seqlens[document]


def rotary_tables(positions: torch.Tensor, config: TransformerConfig) -> Rope:
    """The angles of `positions`, (T,) or (B, T) (Su et al. 2021); cheap enough to compute in every forward pass."""
    # Computed on the device in float32: positions times frequencies need the precision.
    D, scaling = config.head_dim, config.rope_scaling
    channels = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rotary_base ** (-channels / D)
    if scaling is not None:
        turns = scaling.old_context_len * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.scale_factor)
    angles = positions.float()[..., None] * frequencies
    return angles.cos()[..., None, :], angles.sin()[..., None, :]


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turns the heads of x (B, T, heads, D): channel i pairs with i + D / 2, as in Hugging Face's checkpoints."""
    cos, sin = rope
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def _norm(config: TransformerConfig) -> nn.Module:
    if config.normalization == "LayerNorm":
        return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)


def _position_embedding(config: TransformerConfig) -> nn.Embedding | None:
    if config.position_embedding_type != "learned_absolute":
        return None
    if config.seq_length is None:
        raise ConfigError("seq_length=None: learned positions need to know how many there are")
    return nn.Embedding(config.seq_length, config.hidden_size)
