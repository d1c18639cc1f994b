"""One call of `attend`, by its shapes and options, and the fields of its `AttentionSpec`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fiddlehead.attention.spec import length_class
from fiddlehead.attention.switches import must_be_deterministic
from fiddlehead.errors import ConfigError, Problem

NO_LIMIT = (-1, -1)
"""The `window_size` that leaves nothing out."""


class Call(NamedTuple):
    """The shapes and options of a call of `attend`. It is a tuple because it is the key for finding the backend."""

    q: Sequence[int]
    """The shape of q; k and v are the shapes of k and v."""
    k: Sequence[int]
    v: Sequence[int]
    dtype_q: torch.dtype
    dtype_k: torch.dtype
    dtype_v: torch.dtype
    max_seqlen_q: int | None = None
    """Packed: as `attend` takes it; else None."""
    max_seqlen_k: int | None = None
    causal: bool = True
    window_size: tuple[int, int] = NO_LIMIT
    softcap: float = 0.0
    alibi: bool = False
    """Whether the call has ALiBi slopes; the next two: whether it has sinks, and a padding mask."""
    sinks: bool = False
    padding_mask: bool = False
    dropout: float = 0.0
    deterministic: bool = False
    training: bool = True
    """Whether gradients are wanted."""
    packed: bool = False
    cached: bool = False
    """Whether k and v are a cache with a length for each sequence."""
    page_size: int = 0
    """Positions in a page of that cache; 0: not paged."""
    by_passes: bool = False
    """As `AttentionSpec` has it."""


def refuse_mixed(q: torch.dtype, k: torch.dtype, v: torch.dtype) -> None:
    """Raises ConfigError if queries, keys and values have different dtypes."""
    if not q == k == v:
        raise ConfigError(f"q is {q}, k {k} and v {v}: they must have the same dtype")


def spec_fields(call: Call) -> dict[str, Any]:
    """The fields of the call's `AttentionSpec`, as a dictionary, which torch.compile can trace.

    Raises:
        ConfigError: the parts of the call do not fit together.
    """
    T, S = _lengths(call)
    refuse_mixed(call.dtype_q, call.dtype_k, call.dtype_v)
    if min(call.window_size) < -1 or call.softcap < 0 or not 0 <= call.dropout < 1:
        raise ConfigError(*_out_of_range(call))
    causal, window_size = _mask(call, T, S)
    return {
        "dtype": call.dtype_q,
        # Under torch.compile(dynamic=True) numbers are symbolic; an index cannot be, nor a zero. Lengths may stay so.
        "head_dim": operator.index(call.q[-1]),
        "num_attention_heads": operator.index(call.q[-2]),
        "num_query_groups": operator.index(call.k[-2]),
        "causal": causal,
        "window_size": window_size,
        "softcap": call.softcap or 0.0,
        "alibi": call.alibi,
        "sinks": call.sinks,
        "dropout": call.dropout or 0.0,
        "padding_mask": call.padding_mask,
        "packed": call.packed,
        "cached": call.cached,
        "page_size": call.page_size,
        # Decided here, because lengths may be symbolic under torch.compile.
        "same_length": not call.cached if T == S else False,
        "length": 0 if call.page_size else length_class(S),
        "training": call.training,
        "deterministic": call.deterministic or must_be_deterministic(),
        "by_passes": call.by_passes,
    }


def _out_of_range(call: Call) -> list[Problem]:
    limits = (
        ("window_size", min(call.window_size) >= -1, "must be two numbers of -1 or more"),
        ("softcap", call.softcap >= 0, "must not be negative"),
        ("dropout", 0 <= call.dropout < 1, "must be at least 0 and below 1"),
    )
    return [Problem(name, getattr(call, name), message) for name, within, message in limits if not within]


def _lengths(call: Call) -> tuple[int, int]:
    """The numbers of queries and keys of the longest sequence; raises ConfigError if the shapes do not fit together."""
    q, k, v = call.q, call.k, call.v
    if call.packed:
        if len(q) != 3 or len(k) != 3 or k[1] == 0 or k != v or q[2] != k[2] or q[1] % k[1]:
            raise ConfigError(
                f"q{tuple(q)}, k{tuple(k)}, v{tuple(v)} do not fit: "
                "expected (tokens, H, D), (tokens, G, D), (tokens, G, D) with G dividing H"
            )
        if call.max_seqlen_q is None or call.max_seqlen_k is None:
            raise ConfigError(
                Problem("max_seqlen_q", None, "packed sequences need it; reading it from the device would stall")
            )
        if call.padding_mask:
            raise ConfigError(Problem("padding_mask", message="packed sequences (cu_seqlens_q) have no padding"))
        return call.max_seqlen_q, call.max_seqlen_k
    expected = len(q) == len(k) == 4 and k[2] > 0 and k == v and q[3] == k[3] and q[2] % k[2] == 0
    if not expected or (q[0] != k[0] and not call.page_size):
        raise ConfigError(
            f"q{tuple(q)}, k{tuple(k)}, v{tuple(v)} do not fit: "
            "expected (B, T, H, D), (B, S, G, D), (B, S, G, D) with G dividing H"
        )
    if call.causal and q[1] > k[1] and not call.page_size:
        raise ConfigError(
            f"q has {q[1]} positions and k only {k[1]}: under a causal mask the first queries would see no key"
        )
    return q[1], k[1]


def _mask(call: Call, T: int, S: int) -> tuple[bool, tuple[int, int]]:
    """`causal` and `window_size` of the spec. It drops a limit that hides no key, because more backends serve then."""
    causal, (left, right) = call.causal, call.window_size
    if not (call.page_size or call.cached):
        left = -1 if left >= S - 1 else left
        right = -1 if right >= T - 1 else right
        if causal and T == 1 and not call.packed:  # the only query sees every key anyway
            causal, right = False, -1
    if causal:
        right = 0 if left >= 0 else -1
    return causal, (left, right)
