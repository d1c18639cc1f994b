"""The interface of a backend: a module that says what it cannot do and where it is preferred, and runs the kernel.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, N sequences of a packed call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from fiddlehead.attention.spec import AttentionSpec, Target


class Extras(NamedTuple):
    """Arguments that only some calls have, besides q, k and v."""

    cu_seqlens_q: torch.Tensor | None = None
    """Packed: where each sequence of q begins, and the end of the last, (N + 1,) int32; q is then (tokens, H, D)."""
    cu_seqlens_k: torch.Tensor | None = None
    """The same of k and v, (tokens, G, D)."""
    max_seqlen_q: int = 0
    """Packed: at least the longest sequence's length."""
    max_seqlen_k: int = 0
    padding_mask: torch.Tensor | None = None
    """(B, S) bool, true where the key is real."""
    alibi_slopes: torch.Tensor | None = None
    """(H,) or (B, H) float32; the scores lose slope x distance (Press et al. 2022)."""
    sinks: torch.Tensor | None = None
    """(H,): a logit that every query's softmax counts beside its keys, and that has no value."""
    cache_lengths: torch.Tensor | None = None
    """Cached: how many positions of k and v each sequence has filled, (B,) int32."""
    page_table: torch.Tensor | None = None
    """Paged: the page of each sequence's n-th piece, (B, pages) int32; k and v are then (pages, page size, G, D)."""


class Run(Protocol):
    """Attends: q (B, T, H, D), k and v (B, S, G, D), or packed as `extras` says; returns q's shape and dtype.

    It can be differentiated by q, k, v and sinks.
    """

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
    ) -> torch.Tensor: ...


Tensor = torch.Tensor

Forward = Callable[[Tensor, Tensor, Tensor, AttentionSpec, float, Extras], tuple[Tensor, Tensor, Tensor]]
"""Takes the arguments of `Run`.

Returns the output, the logarithm of each softmax's sum, (B, H, T) or packed (H, tokens) float32, and the state from
which a dropout is drawn again, (2,) int64, or (0,) without dropout. Inference needs only the output.
"""
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
"""Takes the output's gradient, q, k, v, what `Forward` returned, the spec, scale and extras.

Returns the gradients of q, k, v and the sinks, new and contiguous; None for the sinks if there are none.
"""


class Passes(NamedTuple):
    """The two passes of a kernel, each by itself, which so can attend to a part of the keys.

    The parts of a softmax are put together by the logarithms of their sums. Given those of the whole softmax and its
    output, `backward` returns the gradients that one part of the keys adds. The specs are `by_passes`, without dropout,
    and the extras have no sinks. What a packed call yields for tokens in no document, or in one of which the part has
    no queries or no keys, does not matter. `lse` is +inf for queries that see no key of any part.
    """

    forward: Forward
    backward: Backward


class Backend(Protocol):
    """One kernel: a module with these names, in this folder or given to `register`.

    It may also have `PASSES`, of the type `Passes`; without them it serves no spec that is `by_passes`.
    """

    NAME: str
    """Its name in `attention_backend` and in every report."""
    PLACE: int
    """Its place in lists of all backends, the smallest first. From `LAST_RESORT` on, it is a last resort."""
    SWITCHES: tuple[str, ...]
    """The environment variables that turn it off when they are 0; of several the last is for this backend alone."""

    @property
    def run(self) -> Run:
        """Runs a call whose spec `why_not` accepts."""
        ...

    def place(self, spec: AttentionSpec, target: Target) -> float | None:
        """Its place in the order of preference, the smallest first; None if it is not worth trying.

        It is a number on the scale of `PLACE`. Backends that are not worth trying come last.
        """
        ...

    def why_not(self, spec: AttentionSpec, target: Target) -> str | None:
        """Why this backend cannot serve `spec` on `target`, or None if it can."""
        ...


FIRST = 1
"""The place ahead of all others."""
LAST_RESORT = 70
"""The `PLACE` from which on `measured` times a backend only if no other can serve."""


def generation(spec: AttentionSpec, target: Target) -> str:
    """The kind of device, which decides places: "cpu", "older", "ampere" (and Ada), "hopper" or "blackwell".

    A GPU before Ampere is "older". So is every GPU in float32 and float64, because few kernels support these.
    """
    if target.device_type != "cuda":
        return "cpu"
    if target.sm < 80 or spec.dtype.itemsize > 2:
        return "older"
    if target.sm < 90:
        return "ampere"
    return "hopper" if target.sm < 100 else "blackwell"
