"""What a call of `attend` asks of a kernel, from its shapes and options alone."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from fiddlehead.attention.spec import length_class
from fiddlehead.attention.switches import must_be_deterministic
from fiddlehead.errors import ConfigError

NO_LIMIT = (-1, -1)
"""The `window_size` that leaves nothing out."""


def call_fields(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dtype: torch.dtype,
    dtype_k: torch.dtype,
    dtype_v: torch.dtype,
    causal: bool = True,
    window_size: tuple[int, int] = NO_LIMIT,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    padding_mask: bool = False,
    dropout: float = 0.0,
    deterministic: bool = False,
    training: bool = True,
    packed: bool = False,
    cached: bool = False,
    page_size: int = 0,
) -> dict[str, Any]:
    """The fields of the `AttentionSpec` of a call, as a dictionary that torch.compile can make.

    Args:
        q, k, v: the shapes of the tensors.
        max_seqlen_q, max_seqlen_k: packed: as `attend` takes them; else None.
        dtype, dtype_k, dtype_v: of q, k and v.
        alibi, sinks, padding_mask: whether the call has such a tensor.
        training: whether gradients will be asked for.
        cached, page_size: of the cache that k and v are; its pages' positions, 0 without pages.

    Raises:
        ConfigError: the parts of the call do not fit together.
    """
    if packed:
        if len(q) != 3 or len(k) != 3 or k[1] == 0 or k != v or q[2] != k[2] or q[1] % k[1]:
            raise ConfigError(
                f"q{tuple(q)}, k{tuple(k)}, v{tuple(v)} do not fit: "
                "expected (tokens, H, D), (tokens, G, D), (tokens, G, D) with G dividing H"
            )
        if max_seqlen_q is None or max_seqlen_k is None:
            raise ConfigError("max_seqlen_q=None: packed sequences need it, as reading it from the device would stall")
        if padding_mask:
            raise ConfigError("padding_mask is for sequences with padding; packed ones (cu_seqlens_q) have none")
        T, S = max_seqlen_q, max_seqlen_k
    else:
        expected = len(q) == len(k) == 4 and k[2] > 0 and k == v and q[3] == k[3] and q[2] % k[2] == 0
        if not expected or (q[0] != k[0] and not page_size):
            raise ConfigError(
                f"q{tuple(q)}, k{tuple(k)}, v{tuple(v)} do not fit: "
                "expected (B, T, H, D), (B, S, G, D), (B, S, G, D) with G dividing H"
            )
        T, S = q[1], k[1]
        if causal and T > S and not page_size:
            raise ConfigError(
                f"q has {T} positions and k only {S}: under a causal mask the first queries would see no key"
            )
    if dtype != dtype_k or dtype != dtype_v:
        raise ConfigError(f"q is {dtype}, k {dtype_k} and v {dtype_v}: they must be of one dtype")
    if min(window_size) < -1 or softcap < 0 or not 0 <= dropout < 1:
        raise ConfigError(
            f"window_size={window_size}, softcap={softcap}, dropout={dropout}: allowed: -1 or more, 0 or more, "
            "and from 0 to below 1"
        )
    left, right = window_size
    if not (page_size or cached):  # a window that leaves nothing out is none, and more backends do without
        left = -1 if left >= S - 1 else left
        right = -1 if right >= T - 1 else right
        if causal and T == 1 and not packed:  # the only query sees every key anyway
            causal, right = False, -1
    if causal:
        right = 0 if left >= 0 else -1
    return {
        "dtype": dtype,
        # Under torch.compile(dynamic=True) numbers are symbolic; an index cannot be, nor a zero. Lengths may stay so.
        "head_dim": operator.index(q[-1]),
        "num_attention_heads": operator.index(q[-2]),
        "num_query_groups": operator.index(k[-2]),
        "causal": causal,
        "window_size": (left, right),
        "softcap": softcap or 0.0,
        "alibi": alibi,
        "sinks": sinks,
        "dropout": dropout or 0.0,
        "padding_mask": padding_mask,
        "packed": packed,
        "cached": cached,
        "page_size": page_size,
        "same_length": not cached if T == S else False,  # decided here: lengths may be symbolic under torch.compile
        "length": 0 if page_size else length_class(S),
        "training": training,
        "deterministic": deterministic or must_be_deterministic(),
    }
