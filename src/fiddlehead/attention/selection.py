"""Which backend serves a call: ask each in order of preference, keep the reasons, take the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from fiddlehead.attention import reference, sdpa
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.errors import ConfigError, unknown


class Backend(Protocol):
    """One kernel: a module of this package with these two functions."""

    def why_not(self, spec: AttentionSpec, target: Target) -> str | None:
        """Why this backend cannot serve `spec` on `target`, or None if it can."""
        ...

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float) -> torch.Tensor:
        """Attend: q (B, T, H, D), k and v (B, S, G, D); returns (B, T, H, D)."""
        ...


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "reference": reference}
"""Every backend by name, the preferred one first."""


@dataclass(frozen=True)
class Choice:
    """The outcome of a selection: the backend taken, if any, and why each of the others was not."""

    spec: AttentionSpec
    target: Target
    backend: str | None
    reasons: dict[str, str]


def explain(spec: AttentionSpec, target: Target, backend: str = "auto") -> Choice:
    """Says which backend serves `spec` on `target`: the first that can, or the one named.

    Raises:
        ConfigError: `backend` is neither "auto" nor the name of a backend.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"attention_backend={backend!r}: {unknown('backend', backend, ['auto', *BACKENDS])}")
    asked: Sequence[str] = list(BACKENDS) if backend == "auto" else [backend]
    reasons: dict[str, str] = {}
    for name in asked:
        reason = BACKENDS[name].why_not(spec, target)
        if reason is None:
            return Choice(spec, target, name, reasons)
        reasons[name] = reason
    return Choice(spec, target, None, reasons)


@lru_cache(maxsize=256)
def select(spec: AttentionSpec, target: Target, backend: str = "auto") -> str:
    """The name of the backend that serves `spec` on `target`.

    Raises:
        ConfigError: no backend can, or the one named cannot; it lists every reason.
    """
    choice = explain(spec, target, backend)
    if choice.backend is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())
        raise ConfigError(f"attention_backend={backend!r} cannot serve this call: {reasons}")
    return choice.backend
