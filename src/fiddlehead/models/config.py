"""The shape of a transformer, in Megatron's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fiddlehead.attention import BACKENDS
from fiddlehead.errors import ConfigError, unknown

Normalization = Literal["RMSNorm", "LayerNorm"]
Activation = Literal["swiglu", "gelu"]
PositionEmbedding = Literal["rope", "learned_absolute", "none"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer. The names and their meaning are Megatron's and NeMo's.

    `vocab_size` and `seq_length` may be left None in a recipe: a task takes them from its data. Every value that
    makes no model raises a `ConfigError` that lists all of them at once.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
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
    layernorm_epsilon: float = 1e-5
    activation: Activation = "swiglu"
    position_embedding_type: PositionEmbedding = "rope"
    rotary_base: float = 10_000.0
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_method_std: float = 0.02
    attention_backend: str = "auto"
    """"auto", or the name of an attention backend."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(*problems)

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

    def num_matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but norms, biases and the embedding lookup."""
        H, G, D = self.num_attention_heads, self.groups, self.head_dim
        attention = self.hidden_size * (H + 2 * G) * D + H * D * self.hidden_size
        mlp = (3 if self.activation == "swiglu" else 2) * self.hidden_size * self.ffn_size
        return self.num_layers * (attention + mlp) + self.hidden_size * (self.vocab_size or 0)

    def train_flops_per_token(self, seq_length: int) -> float:
        """Model FLOPs that one token costs in training, forward and backward, recomputation not counted.

        6 per matmul parameter (Kaplan et al. 2020) plus attention's two products, of which a causal mask needs half:
        6 x layers x seq_length x heads x head_dim.
        """
        attention = 6 * self.num_layers * seq_length * self.num_attention_heads * self.head_dim
        return 6.0 * self.num_matmul_parameters() + attention

    def _problems(self) -> Iterator[str]:
        """Yields a line for each impossible value; the comparisons between fields only look at sound ones."""
        bad: set[str] = set()
        required = ("num_layers", "hidden_size", "num_attention_heads")
        optional = ("num_query_groups", "ffn_hidden_size", "kv_channels", "vocab_size", "seq_length")
        for name in required + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                bad.add(name)
                yield f"{name}={value!r}: must be a whole number of 1 or more{' or None' if name in optional else ''}"
        choices = {
            "normalization": Normalization,
            "activation": Activation,
            "position_embedding_type": PositionEmbedding,
        }
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                yield f"{name}={value!r}: {unknown('value', str(value), get_args(kind))}"
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                yield f"{name}={value!r}: must be a number of at least 0 and below 1"
        for name in ("layernorm_epsilon", "rotary_base", "init_method_std"):
            value = getattr(self, name)
            if not _is_number(value) or not value > 0:
                yield f"{name}={value!r}: must be a number above 0"
        if self.attention_backend not in ("auto", *BACKENDS):
            said = unknown("backend", str(self.attention_backend), ["auto", *BACKENDS])
            yield f"attention_backend={self.attention_backend!r}: {said}"
        heads, groups = self.num_attention_heads, self.num_query_groups
        if not bad & {"num_attention_heads", "num_query_groups"} and groups and heads % groups:
            allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            yield f"num_query_groups={groups} does not divide num_attention_heads={heads}; allowed: {allowed} or None"
        if bad & {"hidden_size", "num_attention_heads", "kv_channels"}:
            return
        if self.kv_channels is None and self.hidden_size % heads:
            lower = self.hidden_size - self.hidden_size % heads
            nearest = f"{lower} or {lower + heads}" if lower else f"{heads}"
            yield (
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                f"the nearest: {nearest}; or set kv_channels"
            )
        elif self.position_embedding_type == "rope" and self.head_dim % 2:
            name = "kv_channels" if self.kv_channels else "hidden_size / num_attention_heads"
            yield f"{name}={self.head_dim} is odd: rotary positions turn pairs of channels"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
