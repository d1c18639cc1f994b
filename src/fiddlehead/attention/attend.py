"""The one attention function that models call.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, N sequences of a packed call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fiddlehead.attention.backends import BACKENDS
from fiddlehead.attention.backends.backend import Backend, Extras
from fiddlehead.attention.call import NO_LIMIT, Call, spec_fields
from fiddlehead.attention.kv_cache import KVCache
from fiddlehead.attention.selection import explain, select
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.attention.switches import Setting, setting
from fiddlehead.attention.tools.measure import fastest
from fiddlehead.attention.tools.sample import Shape
from fiddlehead.errors import ConfigError, Problem


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = NO_LIMIT,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    deterministic: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    kv_cache: KVCache | None = None,
    new_lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Scaled dot-product attention in flash-attn's layout, with grouped key/value heads.

    Query head h reads key/value head h // (H / G), so K and V keep their G heads and are not repeated in memory
    where the kernel reads groups itself. A query that sees no key yields zeros.

    Args:
        q: queries, (B, T, H, D); packed (tokens, H, D).
        k: keys, (B, S, G, D), where G divides H; packed (tokens, G, D).
        v: values, as k.
        causal: query t sees keys up to t + S - T, that is, the last query sees every key (flash-attn's alignment).
        window_size: how many keys to the left and to the right of its own position a query sees; -1 is no limit.
            Under `causal` the right limit has no effect.
        softcap: scores become softcap x tanh(score / softcap) (Gemma 2); 0 leaves them.
        alibi_slopes: (H,) or (B, H) float32; the score of query t and key s loses slope x |t + S - T - s|.
        sinks: (H,), a logit in each softmax that has no value (gpt-oss); it gets a gradient.
        padding_mask: (B, S) bool, true where the key is real.
        dropout: probability with which an attention weight is zeroed.
        scale: factor on the scores; 1 / sqrt(D) if None.
        deterministic: ask for gradients that are the same each time, as PyTorch's
            `use_deterministic_algorithms` and `NVTE_ALLOW_NONDETERMINISTIC_ALGO=0` do for every call.
        cu_seqlens_q: packed: the start of each sequence, and the end of the last, (N + 1,) int32 on q's device.
        cu_seqlens_k: the same of k and v; as `cu_seqlens_q` if None.
        max_seqlen_q: packed: at least the longest sequence's length; reading it from the device would cost a wait.
        max_seqlen_k: the same of k and v; as `max_seqlen_q` if None.
        kv_cache: k and v are appended to it first, and q attends to the whole cache. A refused call does not change it.
            There are no gradients through it.
        new_lengths: with a cache: how many of the T new positions each sequence has, (B,) integers on q's device; the
            others are padding on the right, whose queries yield meaningless values. None: all T.
        backend: "auto", "measured", or the name of a backend.

    Returns:
        The shape and dtype of q.

    Raises:
        ConfigError: the shapes do not fit together, or no backend can serve the call.
    """
    cache_lengths = page_table = None
    page_size = new_positions = 0
    if kv_cache is not None or new_lengths is not None:
        _check_new(q, k, causal, kv_cache, new_lengths)
    if kv_cache is not None:
        new_positions = k.shape[1]
        view = kv_cache.write(k, v)
        k, v, page_size = view.k, view.v, view.page_size
        cache_lengths, page_table = view.cache_lengths, view.page_table
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    training = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )
    call = Call(  # by position, in the order of its fields: keywords would add a microsecond to each call
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        k.dtype,
        v.dtype,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        window_size,
        softcap,
        alibi_slopes is not None,
        sinks is not None,
        padding_mask is not None,
        dropout,
        deterministic,
        training,
        cu_seqlens_q is not None,
        cache_lengths is not None,
        page_size,
    )
    spec, chosen, has_extras = backend_for(call, q.device, backend)
    if kv_cache is not None:
        kv_cache.advance(new_positions, new_lengths)
    factor = 1 / math.sqrt(spec.head_dim) if scale is None else scale
    if not has_extras:
        return chosen.run(q, k, v, spec, factor, NOTHING)
    extras = Extras(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q or 0,
        max_seqlen_k=max_seqlen_k or 0,
        padding_mask=padding_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cache_lengths=cache_lengths,
        page_table=page_table,
    )
    return chosen.run(q, k, v, spec, factor, extras)


def _check_new(
    q: torch.Tensor, k: torch.Tensor, causal: bool, kv_cache: KVCache | None, new_lengths: torch.Tensor | None
) -> None:
    """Raises ConfigError if queries and new keys do not fit together; the cache's shape alone does not show that."""
    if kv_cache is None:
        advice = "needs a kv_cache; without one, pack the sequences (cu_seqlens_q)"
        raise ConfigError(Problem("new_lengths", message=advice))
    if q.shape[0] != k.shape[0]:
        raise ConfigError(f"q{tuple(q.shape)}, k{tuple(k.shape)} do not fit: expected as many sequences of both")
    if new_lengths is not None and not (causal and q.shape[1] == k.shape[1]):
        message = (
            "needs causal=True, so that no query sees the padding, and as many queries as new keys; this "
            f"call has causal={causal}, {q.shape[1]} queries and {k.shape[1]} new keys"
        )
        raise ConfigError(Problem("new_lengths", message=message))


NOTHING = Extras()
_chosen: dict[Any, tuple[AttentionSpec, Backend, bool]] = {}
"""The choice for each kind of call. Choosing again would take longer than a small kernel."""
_watchers: list[Callable[[AttentionSpec, str], None]] = []


def backend_for(call: Call, device: torch.device, backend: str) -> tuple[AttentionSpec, Backend, bool]:
    """The spec of a call, the backend that serves it, and whether it has extras."""
    if torch.compiler.is_compiling():
        return _choose_while_tracing(call, device, backend)
    key = (call, device, backend, setting())
    found = _chosen.get(key)
    if found is None:
        if len(_chosen) >= 4096:  # a decoder's keys grow with each token
            _chosen.clear()
        spec = AttentionSpec(**spec_fields(call))
        name = "reference" if _is_empty(call) else _serving(spec, device, backend, _shape(call, spec))
        found = _chosen[key] = spec, BACKENDS[name], spec.has_extras
    return found


def _is_empty(call: Call) -> bool:
    """Whether the call has no queries or no keys. PyTorch's kernels for CPUs then divide by 0, and the process ends."""
    return 0 in call.q[:-2] or (0 in call.k[:-2] and not call.page_size)


def _choose_while_tracing(call: Call, device: torch.device, backend: str) -> tuple[AttentionSpec, Backend, bool]:
    """As `backend_for`, under torch.compile, which traces the call again when the setting or the spec changes."""
    fields = spec_fields(call)
    spec = AttentionSpec(**fields)
    # Lengths may be symbolic and stay so, unless the choice depends on them.
    shape = _shape(call, spec) if backend == "measured" else ()
    name = _serving_while_tracing(tuple(fields.items()), device, backend, tuple(shape), setting())
    return spec, BACKENDS[name], spec.has_extras


def _serving_while_tracing(
    fields: tuple[tuple[str, Any], ...],
    device: torch.device,
    backend: str,
    shape: tuple[int, ...],
    _setting: Setting,
) -> str:
    """A constant of the graph: its arguments are constants."""
    return _serving(AttentionSpec(**dict(fields)), device, backend, Shape(*shape) if shape else None)


# As `torch.compiler.assume_constant_result` does, which would import the compiler where nothing is compiled.
_serving_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _serving(spec: AttentionSpec, device: torch.device, backend: str, shape: Shape | None) -> str:
    """The backend that serves the spec; raises ConfigError if none does."""
    target = Target.of(device)
    if backend != "measured":
        name = select(spec, target, backend)
    else:
        choice = explain(spec, target, backend)
        choice.required()
        assert shape is not None
        name = fastest({name: BACKENDS[name] for name in choice.candidates}, spec, target, device, shape)
    for watcher in _watchers:
        watcher(spec, name)
    return name


@contextmanager
def watched(watcher: Callable[[AttentionSpec, str], None]) -> Iterator[None]:
    """Within the block, calls `watcher` once for each kind of call, with its spec and the backend that serves it."""
    _chosen.clear()  # the watcher would not hear of calls that were chosen before
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _shape(call: Call, spec: AttentionSpec) -> Shape:
    """The sizes with which this call is measured."""
    if spec.packed:
        assert call.max_seqlen_q is not None and call.max_seqlen_k is not None
        return Shape(max(1, call.q[0] // call.max_seqlen_q), call.max_seqlen_q, call.max_seqlen_k)
    batch, length = call.q[:2]
    return Shape(batch, length, call.k[0] * call.k[1] // batch if spec.page_size else call.k[1])
