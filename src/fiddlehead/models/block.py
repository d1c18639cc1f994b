"""A layer of the decoder: attention and feed-forward. Shapes are named as in `fiddlehead.models.transformer`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fiddlehead.attention import KVCache, attend
from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.collectives import Group, HeadExchange, SequenceSplit
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.head_tiles import Numbers, Tensors, attend_in_tiles
from fiddlehead.models.linear import Linear
from fiddlehead.models.moe import MoE, Sequences, activate
from fiddlehead.models.norms import norm, rms_norm
from fiddlehead.models.places import Documents
from fiddlehead.models.ring import Ring
from fiddlehead.models.rope import Rope, rotate
from fiddlehead.models.tiles import in_tiles


class Block(nn.Module):
    """Attention, then feed-forward, each with a residual connection, and with norms before them, after them or both."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.number = layer
        self.split = SequenceSplit()  # as the transformer's
        self.dropout, self.multiplier = config.hidden_dropout, config.residual_multiplier
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.input_layernorm = norm(config) if before else None
        self.self_attention = Attention(config, layer)
        self.post_attention_layernorm = norm(config) if after else None
        self.pre_mlp_layernorm = norm(config) if before else None
        self.mlp = MLP(config) if config.num_moe_experts is None else MoE(config)
        self.post_mlp_layernorm = norm(config) if after else None
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
        return x + self.split.dropout(new, self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and one fused projection.

    The rows of `linear_qkv` are all query heads, then the key heads, then the value heads.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window_size = config.window(layer)
        # `parallelize` leaves a process part of the heads; exchanges heads for whole sequences, or for longer parts of
        # them; and passes the keys and values of parts on.
        self.heads, self.groups = config.num_attention_heads, config.groups
        self.exchange: HeadExchange | None = None
        self.ring: Ring | None = None
        self.tiled: int | None = None
        """The key/value heads of a tile in which it is computed; None: it computes all heads at once."""
        H, G, D = config.num_attention_heads, config.groups, config.head_dim
        bias = config.add_bias_linear
        self.linear_qkv: nn.Linear = Linear(config.hidden_size, (H + 2 * G) * D, bias=bias or config.add_qkv_bias)
        self.linear_proj: nn.Linear = Linear(H * D, config.hidden_size, bias=bias)
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm is not None:
            whole = config.qk_layernorm == "projection"
            self.q_layernorm, self.k_layernorm = (rms_norm(config, n * D if whole else D) for n in (H, G))
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
        if self.tiled is not None and cache is None:
            return self._in_tiles(x, rope, documents, self.tiled)
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
        out = self._attend(q, k, v, sinks, documents, cache, new_lengths)
        if self.exchange is not None:
            out = self.exchange.to_sequence(out)
        return self.linear_proj(out.reshape(B, T, H * D))

    def _in_tiles(
        self, x: torch.Tensor, rope: Rope | None, documents: Documents | None, at_a_time: int
    ) -> torch.Tensor:
        """As `forward`, for so many key/value heads at a time."""
        config = self.config
        qkv, proj = self.linear_qkv, self.linear_proj
        norms: tuple[Any, ...] = (self.q_layernorm, self.k_layernorm)
        q_norm, k_norm = (None if norm is None else norm.weight for norm in norms)
        cos, sin = (None, None) if rope is None else rope
        cu_seqlens, max_seqlen = (None, None) if documents is None else documents
        learned = (x, qkv.weight, qkv.bias, q_norm, k_norm)
        numbers = Numbers(
            heads=self.heads,
            groups=self.groups,
            at_a_time=at_a_time,
            scale=config.softmax_scale or 1 / math.sqrt(config.head_dim),
            softcap=config.attn_logit_softcapping or 0.0,
            left=self.window_size[0],
            right=self.window_size[1],
            eps=config.layernorm_epsilon,
            zero_centered=config.layernorm_zero_centered_gamma,
            max_seqlen=max_seqlen or 0,
            training=torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in learned),
            backend=config.attention_backend,
        )
        return attend_in_tiles(Tensors(*learned, cos, sin, cu_seqlens), proj.weight, proj.bias, numbers)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        documents: Documents | None,
        cache: KVCache | None,
        new_lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        """q (B, T, heads, D) to its shape."""
        softcap, scale = self.config.attn_logit_softcapping or 0.0, self.config.softmax_scale
        backend = self.config.attention_backend
        if self.ring is not None:
            return self.ring.attend(q, k, v, documents, sinks=sinks, softcap=softcap, scale=scale, backend=backend)
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
            softcap=softcap,
            sinks=sinks,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scale=scale,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=max_seqlen,
            kv_cache=cache,
            new_lengths=new_lengths,
            backend=backend,
        )
        return out.reshape(shape)


class MLP(nn.Module):
    """Feed-forward. With a gate, `linear_fc1` fuses the gate's projection and the other one, gate first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        width = 2 * config.ffn_size if config.gated else config.ffn_size
        self.linear_fc1: nn.Linear = Linear(config.hidden_size, width, bias=config.add_bias_linear)
        self.linear_fc2: nn.Linear = Linear(config.ffn_size, config.hidden_size, bias=config.add_bias_linear)
        self.fused: Callable[[MLP, torch.Tensor], torch.Tensor] | None = None
        """What computes it where products are in bfloat16, if that is not PyTorch; `fuse_mlp` sets it."""
        self.group: Group | None = None
        """The processes that share its width; `parallelize` sets it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        if self.fused is not None and product_dtype(x) == torch.bfloat16:
            return self.fused(self, x)
        return self.linear_fc2(activate(self.linear_fc1(x), self.activation))
