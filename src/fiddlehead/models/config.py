"""The shape of a transformer, in Megatron's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

import torch

from fiddlehead.attention import AttentionSpec, backend_choices
from fiddlehead.attention.call import Call, spec_fields
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.models.rope import LongRopeScaling, Rotary, Scaling, scaling_from_dict
from fiddlehead.numbers import is_number, is_whole
from fiddlehead.recipe.resumable import Resumable

Normalization = Literal["RMSNorm", "LayerNorm"]
NormPlacement = Literal["pre", "post", "both"]
QKLayernorm = Literal["head", "projection"]
Activation = Literal["swiglu", "geglu", "gelu", "squared_relu", "clamped_swiglu"]
PositionEmbedding = Literal["rope", "learned_absolute", "none"]
RingStep = Literal["own", "earlier", "later"]
"""Whose keys a process attends to in a step of a ring: its own; those of a process before it, or of one behind it."""

UNKNOWN = 1 << 62
"""The length of a sequence whose length is unknown: wider than any window, and in no class of lengths."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer. The names and their meaning are Megatron's and NeMo's.

    `vocab_size` and `seq_length` may be None in a recipe: a task takes them from its data. Impossible values raise one
    `ConfigError` that lists all of them.
    """

    num_layers: int
    """The number of transformer layers."""
    hidden_size: int
    """The width of the residual stream."""
    num_attention_heads: int
    """Query heads of a layer."""
    num_query_groups: int | None = None
    """Key/value heads: None is multi-head, 1 multi-query (MQA), a divisor of the heads grouped-query (GQA)."""
    ffn_hidden_size: int | None = None
    """Width inside the feed-forward layer; None is 4 x hidden_size."""
    kv_channels: int | None = None
    """Width of one attention head; None is hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    seq_length: int | None = None
    """The longest sequence that the model is trained on; learned positions have this many rows."""
    normalization: Normalization = "RMSNorm"
    """The kind of the norms."""
    layernorm_epsilon: float = 1e-5
    """What a norm adds to the variance."""
    layernorm_zero_centered_gamma: bool = False
    """RMSNorm multiplies by 1 + weight (Gemma)."""
    norm_placement: NormPlacement = "pre"
    """Whether attention and feed-forward have a norm before them, after them (OLMo 2) or both (Gemma 2)."""
    qk_layernorm: QKLayernorm | None = None
    """RMSNorm of queries and keys before they turn: each "head" by itself (Qwen 3), or the whole "projection"
    (OLMo 2)."""
    activation: Activation = "swiglu"
    """SwiGLU and GeGLU are gated by SiLU and by GELU (Shazeer 2020); clamped_swiglu is gpt-oss's. GELU is the tanh
    form. Squared ReLU (So et al. 2021) is Nemotron's."""
    position_embedding_type: PositionEmbedding = "rope"
    """How a token knows its place: rotary, by learned vectors, or not at all."""
    rotary_base: float = 10_000.0
    """The base of the rotary frequencies (theta)."""
    rotary_base_local: float | None = None
    """The base, without a scaling, of the layers that have the window (Gemma 3); None: that of all."""
    rotary_percent: float = 1.0
    """The part of a head's channels that turns, from the first on (Phi-4 mini)."""
    rope_scaling: Scaling | None = None
    """How rotary frequencies are scaled for longer sequences; None leaves them."""
    add_bias_linear: bool = False
    """Whether linear layers have a bias."""
    add_qkv_bias: bool = False
    """Whether the projection to q, k and v has a bias (Qwen 2.5)."""
    share_embeddings_and_output_weights: bool = False
    """Whether the output layer has the weights of the embedding."""
    window_size: tuple[int, int] | None = None
    """Sliding window: the number of tokens to the left and to the right that a token sees, -1 for all; None means all.
    Attention is causal, so the right limit is 0: (1023, 0) is Mistral's and Gemma's window of 1024."""
    window_attn_skip_freq: int | tuple[int, ...] | None = None
    """Which layers have the window: None means all, N all except every N-th. A list of num_layers numbers has 1 for a
    layer with the window and 0 for one without."""
    attn_logit_softcapping: float | None = None
    """Scores become cap x tanh(score / cap) (Gemma 2); None leaves them."""
    final_logit_softcapping: float | None = None
    """The same for the logits."""
    softmax_scale: float | None = None
    """The factor on scores; None means 1 / sqrt(head dim)."""
    attention_sinks: bool = False
    """Each head has a learned logit in its softmax that takes weight and has no value (gpt-oss)."""
    embedding_multiplier: float = 1.0
    """The factor on the embeddings (Gemma, Granite)."""
    residual_multiplier: float = 1.0
    """The factor on the outputs of attention and feed-forward before the residual addition (Granite)."""
    logits_scaling: float = 1.0
    """Logits are divided by it (Granite)."""
    num_moe_experts: int | None = None
    """Each token is served by `moe_router_topk` of so many feed-forward layers; None: there is one, for all tokens."""
    moe_router_topk: int = 2
    """How many experts serve a token."""
    moe_ffn_hidden_size: int | None = None
    """Width inside an expert; None is that of a feed-forward layer."""
    moe_router_pre_softmax: bool = False
    """Experts are weighed by their probability among all of them, and not among the chosen ones alone."""
    moe_aux_loss_coeff: float = 0.0
    """The weight, in training, of the load-balancing loss of the experts (Fedus et al. 2021), as Megatron's
    `seq_aux_loss`: for each sequence and layer, `num_moe_experts` x the sum over experts of the expert's share of all
    assignments x its mean probability. It is 1 with an even load for every `moe_router_topk`. Layers are added, and
    sequences are averaged, weighted by their tokens."""
    attention_dropout: float = 0.0
    """The part of the attention weights that training drops."""
    hidden_dropout: float = 0.0
    """The part of a layer's outputs that training drops."""
    init_method_std: float = 0.02
    """The standard deviation of the initial weights."""
    attention_backend: Resumable[str] = "auto"
    """"auto", "measured", or the name of an attention backend."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        """Number of key/value heads, G."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width inside the feed-forward layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether feed-forward layers have a gate."""
        return self.activation not in ("gelu", "squared_relu")

    @property
    def expert_size(self) -> int:
        """Width inside an expert."""
        return self.moe_ffn_hidden_size or self.ffn_size

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The reverse of `asdict`. It also takes the values as JSON returns them.

        Raises:
            ConfigError: a field is unknown or missing, or has an impossible value.
        """
        if not isinstance(values, dict):
            raise ConfigError(Problem("config", message=f"must be an object, not a {type(values).__name__}"))
        names = [field.name for field in fields(cls)]
        refuse(Problem.unknown("", name, "field", names) for name in values if name not in names)
        needed = [field.name for field in fields(cls) if field.default is field.default_factory is MISSING]
        refuse(Problem(name, message="is missing") for name in needed if name not in values)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if isinstance(scaling := values.get("rope_scaling"), dict):
            values["rope_scaling"] = scaling_from_dict(scaling)
        return cls(**values)

    def window(self, layer: int) -> tuple[int, int]:
        """How many keys to the left and right the layer with this index, from 0, sees; -1 means all."""
        skip = self.window_attn_skip_freq
        full = (layer + 1) % skip == 0 if isinstance(skip, int) else skip is not None and not skip[layer]
        return (-1, -1) if self.window_size is None or full else self.window_size

    def rotary(self, layer: int) -> Rotary:
        """The rotary positions of the layer with this index, from 0."""
        channels = int(self.head_dim * self.rotary_percent)
        if self.rotary_base_local is not None and self.window(layer) != (-1, -1):
            return Rotary(channels, self.rotary_base_local)
        return Rotary(channels, self.rotary_base, self.rope_scaling)

    @property
    def longrope_length(self) -> int | None:
        """The longest sequence with LongRoPE's short factors; None if the rotation does not depend on the length."""
        if self.position_embedding_type != "rope" or not isinstance(self.rope_scaling, LongRopeScaling):
            return None
        return self.rope_scaling.old_context_len

    def attention_spec(
        self,
        layer: int,
        dtype: torch.dtype,
        *,
        packed: bool = False,
        training: bool = True,
        gradients: bool | None = None,
        deterministic: bool = False,
        longest: int | None = None,
        tp: int = 1,
        cp: int = 1,
        ring: int = 1,
        step: RingStep = "own",
        at_a_time: int | None = None,
    ) -> AttentionSpec:
        """The spec of the attention call of the layer with this index, from 0.

        Args:
            training: whether the model is in training mode, with dropout.
            gradients: whether gradients are needed; None means the same as `training`.
            deterministic: as `attend` takes it.
            longest: the longest sequence or, if `packed`, the documents' `max_seqlen`; `seq_length` if None.
            tp: processes that share each layer.
            cp: processes that share each sequence; they exchange heads, so a kernel sees the whole sequence.
            ring: parts of each sequence whose keys and values go round between these processes; cp / ring of them
                exchange heads. A kernel then sees one or both halves of a process's part.
            step: with a ring, whose keys the kernel sees.
            at_a_time: the key/value heads of a call where not all are computed at once.
        """
        heads, groups = split_heads(*split_heads(self.num_attention_heads, self.groups, tp), cp // ring)
        if at_a_time is not None:
            heads, groups = heads // groups * at_a_time, at_a_time
        T = S = longest or self.seq_length or UNKNOWN
        if ring > 1:
            of_rank = (self.seq_length or T) // ring
            T, S = (min(T, of_rank // 2 if halved == step else of_rank) for halved in ("later", "earlier"))
        q, k = (
            (*((length,) if packed else (1, length)), count, self.head_dim)
            for length, count in ((T, heads), (S, groups))
        )
        call = Call(
            q=q,
            k=k,
            v=k,
            dtype_q=dtype,
            dtype_k=dtype,
            dtype_v=dtype,
            max_seqlen_q=T if packed else None,
            max_seqlen_k=S if packed else None,
            causal=ring == 1 or step == "own",
            window_size=self.window(layer),
            softcap=self.attn_logit_softcapping or 0.0,
            sinks=self.attention_sinks and ring == 1,  # a ring adds them afterwards
            dropout=self.attention_dropout if training else 0.0,
            deterministic=deterministic,
            training=training if gradients is None else gradients,
            packed=packed,
            by_passes=ring > 1 or at_a_time is not None,
        )
        return AttentionSpec(**spec_fields(call))

    def num_matmul_parameters(self) -> int:
        """Parameters that multiply a token: all except norms, biases, the embedding, and experts not chosen."""
        H, G, D = self.num_attention_heads, self.groups, self.head_dim
        attention = self.hidden_size * (H + 2 * G) * D + H * D * self.hidden_size
        matrices = 3 if self.gated else 2
        mlp = matrices * self.hidden_size * self.ffn_size
        if self.num_moe_experts is not None:
            mlp = self.hidden_size * (matrices * self.expert_size * self.moe_router_topk + self.num_moe_experts)
        return self.num_layers * (attention + mlp) + self.hidden_size * (self.vocab_size or 0)

    def train_flops_per_token(self, seq_length: int, *, causal: bool = True, adapters: int | None = None) -> float:
        """Model FLOPs that one token costs in training, forward and backward, recomputation not counted.

        6 per matmul parameter (Kaplan et al. 2020) plus attention's two products, 12 x heads x head_dim for each key
        that a token sees. With a causal mask these are half of seq_length keys on average, and fewer in a layer with a
        window. Document packing is ignored. Without `causal`, every token counts as if it saw all keys in all layers,
        as in PaLM (Chowdhery et al. 2022, appendix B), nanoGPT and torchtitan.

        Args:
            adapters: the number of adapter parameters, if only these are trained; all others then cost 4 each, because
                their gradients are not computed.
        """
        products = 6.0 * self.num_matmul_parameters()
        if adapters is not None:
            products = 4.0 * self.num_matmul_parameters() + 6.0 * adapters
        if not causal:
            attention = 12.0 * seq_length * self.num_layers * self.num_attention_heads * self.head_dim
            return products + attention
        keys = 0.0
        for layer in range(self.num_layers):
            left, _ = self.window(layer)
            seen = seq_length if left < 0 else min(left + 1, seq_length)
            keys += seen * (1 - seen / (2 * max(1, seq_length)))
        return products + 12 * keys * self.num_attention_heads * self.head_dim

    def _problems(self) -> Iterator[Problem]:
        """Yields a problem for each impossible value. Comparisons between fields skip impossible values."""
        bad: set[str] = set()
        required = ("num_layers", "hidden_size", "num_attention_heads", "moe_router_topk")
        optional = (
            *("num_query_groups", "ffn_hidden_size", "kv_channels", "vocab_size", "seq_length"),
            *("num_moe_experts", "moe_ffn_hidden_size"),
        )
        for name in required + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not (is_whole(value) and value >= 1):
                bad.add(name)
                yield Problem(
                    name, value, f"must be a whole number of 1 or more{' or None' if name in optional else ''}"
                )
        choices = {
            "normalization": Normalization,
            "norm_placement": NormPlacement,
            "qk_layernorm": QKLayernorm,
            "activation": Activation,
            "position_embedding_type": PositionEmbedding,
        }
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind) and not (name == "qk_layernorm" and value is None):
                yield Problem.unknown(name, value, "value", get_args(kind))
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                yield Problem(name, value, "must be a number of at least 0 and below 1")
        above_zero = ("layernorm_epsilon", "rotary_base", "init_method_std", "rotary_percent")
        multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        or_none = ("rotary_base_local", "attn_logit_softcapping", "final_logit_softcapping", "softmax_scale")
        for name in above_zero + multipliers + or_none:
            value = getattr(self, name)
            if value is None and name in or_none:
                continue
            if not is_number(value) or not value > 0:
                yield Problem(name, value, f"must be a number above 0{' or None' if name in or_none else ''}")
        yield from self._norm_problems()
        yield from self._moe_problems(bad)
        yield from self._window_problems(bad)
        if self.attention_backend not in backend_choices():
            yield Problem.unknown("attention_backend", self.attention_backend, "backend", backend_choices())
        heads, groups = self.num_attention_heads, self.num_query_groups
        if not bad & {"num_attention_heads", "num_query_groups"} and groups and heads % groups:
            allowed = (*(n for n in range(1, heads + 1) if heads % n == 0), None)
            yield Problem("num_query_groups", groups, f"does not divide num_attention_heads={heads}", allowed)
        if bad & {"hidden_size", "num_attention_heads", "kv_channels"}:
            return
        if self.kv_channels is None and self.hidden_size % heads:
            lower = self.hidden_size - self.hidden_size % heads
            nearest = f"{lower} or {lower + heads}" if lower else f"{heads}"
            message = f"is not a multiple of num_attention_heads={heads}; the nearest: {nearest}; or set kv_channels"
            yield Problem("hidden_size", self.hidden_size, message)
        elif self.position_embedding_type == "rope" and is_number(self.rotary_percent):
            yield from self._rotary_problems()

    def _rotary_problems(self) -> Iterator[Problem]:
        if self.rotary_percent > 1:
            yield Problem("rotary_percent", self.rotary_percent, "must be at most 1")
        elif (turning := int(self.head_dim * self.rotary_percent)) % 2 or not turning:
            name = "kv_channels" if self.kv_channels else "hidden_size"
            part = "" if self.rotary_percent == 1 else f", and rotary_percent={self.rotary_percent!r} turns {turning}"
            message = f"a head has {self.head_dim} channels{part}; rotary positions turn pairs of channels"
            yield Problem(name, getattr(self, name), message)
        elif isinstance(scaling := self.rope_scaling, LongRopeScaling) and len(scaling.short_factor) != turning // 2:
            message = f"has {len(scaling.short_factor)} numbers; {turning} rotary channels need {turning // 2}"
            yield Problem("rope_scaling.short_factor", message=message)

    def _norm_problems(self) -> Iterator[Problem]:
        if self.normalization == "LayerNorm":
            if self.layernorm_zero_centered_gamma:
                yield Problem("layernorm_zero_centered_gamma", True, "only RMSNorm has it; normalization='LayerNorm'")
            if self.norm_placement != "pre":
                yield Problem("norm_placement", self.norm_placement, "only RMSNorm has it; normalization='LayerNorm'")
        if self.rotary_base_local is not None and self.window_size is None:
            yield Problem("rotary_base_local", self.rotary_base_local, "no layer has a window; set window_size")

    def _moe_problems(self, bad: set[str]) -> Iterator[Problem]:
        if not is_number(self.moe_aux_loss_coeff) or self.moe_aux_loss_coeff < 0:
            yield Problem("moe_aux_loss_coeff", self.moe_aux_loss_coeff, "must be a number of 0 or more")
        experts, topk = self.num_moe_experts or 0, self.moe_router_topk
        if experts and not bad & {"num_moe_experts", "moe_router_topk"} and topk > experts:
            yield Problem("moe_router_topk", topk, f"there are num_moe_experts={experts}")

    def _window_problems(self, bad: set[str]) -> Iterator[Problem]:
        window, skip = self.window_size, self.window_attn_skip_freq
        if window is not None and (
            not isinstance(window, tuple)
            or len(window) != 2
            or not all(is_whole(side) and side >= -1 for side in window)
        ):
            yield Problem("window_size", window, "must be two whole numbers of -1 or more, (left, right), or None")
        if skip is None:
            return
        if window is None:
            yield Problem("window_attn_skip_freq", skip, "there is no window; set window_size, or leave it None")
        if isinstance(skip, tuple):
            if any(mark not in (0, 1) for mark in skip):
                yield Problem("window_attn_skip_freq", list(skip), "each must be 1, with the window, or 0, without")
            elif "num_layers" not in bad and len(skip) != self.num_layers:
                message = f"has {len(skip)} numbers; num_layers={self.num_layers} needs as many"
                yield Problem("window_attn_skip_freq", list(skip), message)
        elif not is_whole(skip) or skip < 1:
            yield Problem(
                "window_attn_skip_freq", skip, "must be a whole number of 1 or more, a list of 0 and 1, or None"
            )


def split_heads(heads: int, groups: int, parts: int) -> tuple[int, int]:
    """The number of query and key/value heads that each of `parts` processes has.

    If there are fewer key/value heads than processes, several processes have the same head.
    """
    return heads // parts, max(groups // parts, 1)
