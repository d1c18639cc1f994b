"""Selects the backend of a call: the first one that can serve it, in order of preference; explains all others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from fiddlehead import notebook
from fiddlehead.attention import switches
from fiddlehead.attention.backends import BACKENDS, RESERVED
from fiddlehead.attention.backends.backend import Backend
from fiddlehead.attention.packages import Package
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.errors import ConfigError, Problem

logger = logging.getLogger(__name__)


def backend_choices() -> tuple[str, ...]:
    """The possible values of `backend`: "auto", "measured", and the name of every backend."""
    return (*RESERVED, *BACKENDS)


def preference(spec: AttentionSpec, target: Target) -> Sequence[str]:
    """The backends worth trying for `spec` on `target`, best first; each backend gives its own place.

    With only flash-attn 2 and cuDNN, this is the order of NeMo and Transformer Engine: cuDNN first on Hopper and later,
    flash-attn first on Ampere. With flash-attn 3 or 4, the order on Hopper was measured on an H100.
    """
    places = {name: backend.place(spec, target) for name, backend in BACKENDS.items()}
    worth_trying = [(place, name) for name, place in places.items() if place is not None]
    return [name for _, name in sorted(worth_trying, key=lambda item: item[0])]


@dataclass(frozen=True)
class Choice:
    """The result of a selection: the backend taken, if any, and why each other one was not."""

    spec: AttentionSpec
    target: Target
    asked: str
    candidates: tuple[str, ...]
    """The backends that can serve the spec, the preferred one first."""
    reasons: dict[str, str]
    """Why each of the others cannot."""

    @property
    def backend(self) -> str | None:
        """The backend taken; None if none can."""
        return self.candidates[0] if self.candidates else None

    def required(self) -> str:
        """The backend taken.

        Raises:
            ConfigError: no backend can serve; the error gives each one's reason.
        """
        if self.backend is None:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            message = f"cannot serve {self.spec} on {self.target.name}: {why}"
            raise ConfigError(Problem("attention_backend", self.asked, message))
        return self.backend

    @property
    def measured(self) -> bool:
        """Whether timing the candidates in the first call decides which of them serves."""
        return self.asked == "measured" and len(self.candidates) > 1

    def rows(self) -> list[tuple[str, str, str]]:
        """Each backend in order of preference: name, "chosen", "kept", "dropped" or "not asked for", and the reason.

        A backend that is not dropped has no reason; in its place may stand a note on its package's version.
        """
        rows = []
        for name in _order(self.spec, self.target):
            if name in self.reasons:
                rows.append((name, "dropped", self.reasons[name]))
            elif name in self.candidates:
                package = getattr(self.target.packages, name, None)
                verdict = "chosen" if name == self.backend and not self.measured else "kept"
                rows.append((name, verdict, (package.note if isinstance(package, Package) else None) or ""))
            else:
                rows.append((name, "not asked for", ""))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON values; `backend` is None if none serves or if a measurement will decide."""
        target = asdict(self.target)
        return {
            "spec": {**asdict(self.spec), "dtype": str(self.spec.dtype).removeprefix("torch.")},
            "asked": self.asked,
            "backend": None if self.measured else self.backend,
            "candidates": list(self.candidates),
            "reasons": self.reasons,
            "packages": target.pop("packages"),
            "target": target,
        }

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _, _ in rows)
        lines = [f"  {name:{width}}  {verdict}{': ' if why else ''}{why}" for name, verdict, why in rows]
        return "\n".join([f"{self.spec} on {self.target.name}", *lines])

    def _repr_html_(self) -> str:
        table = notebook.table(("backend", "verdict", "reason"), self.rows(), f"{self.spec} on {self.target.name}")
        return notebook.STYLE + table


def explain(spec: AttentionSpec, target: Target, backend: str = "auto") -> Choice:
    """Says which backend serves `spec` on `target`, and why the others do not.

    Args:
        backend: "auto" takes the first in the order of `preference`; a name allows only that backend; "measured" is
            "auto" here, because the times are taken when a call runs.

    Raises:
        ConfigError: `backend` is not one of these.
    """
    if backend not in backend_choices():
        raise ConfigError(Problem.unknown("attention_backend", backend, "backend", backend_choices()))
    if switches.must_be_deterministic():
        spec = replace(spec, deterministic=True)
    candidates: list[str] = []
    reasons: dict[str, str] = {}
    for name in _order(spec, target):
        if backend in BACKENDS and name != backend:
            continue
        reason = _why_not(BACKENDS[name], spec, target)
        if reason is None:
            candidates.append(name)
        else:
            reasons[name] = reason
    return Choice(spec, target, backend, tuple(candidates), reasons)


def _why_not(backend: Backend, spec: AttentionSpec, target: Target) -> str | None:
    """Why the backend cannot serve `spec` on `target`, or may not; None if it can."""
    if off := switches.turned_off(backend):
        return f"turned off by {off}=0"
    if spec.by_passes and not hasattr(backend, "PASSES"):
        return "pass by pass: does not return the logarithm of the softmax's sum for both passes"
    return backend.why_not(spec, target)


def _order(spec: AttentionSpec, target: Target) -> list[str]:
    """Every backend in order of preference; those that are not worth trying come last."""
    order = preference(spec, target)
    return [*order, *(name for name in BACKENDS if name not in order)]


def select(spec: AttentionSpec, target: Target, backend: str = "auto") -> str:
    """The name of the backend that serves `spec` on `target`, logged the first time.

    Raises:
        ConfigError: no backend can, or the named one cannot; the error gives every reason.
    """
    return _select(spec, target, backend, switches.setting())


@lru_cache(maxsize=1024)
def _select(spec: AttentionSpec, target: Target, backend: str, _setting: switches.Setting) -> str:
    name = explain(spec, target, backend).required()
    logger.info("attention: %s on %s for %s", name, target.name, spec)
    return name
