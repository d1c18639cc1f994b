"""Selects the backend that serves a call: the first in order of preference that can, with the reasons of the others."""

from __future__ import annotations

import html
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from fiddlehead.attention import switches
from fiddlehead.attention.backends import BACKENDS, RESERVED
from fiddlehead.attention.packages import Package
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.errors import ConfigError, unknown

logger = logging.getLogger(__name__)


def backend_choices() -> tuple[str, ...]:
    """What may be asked for: "auto", "measured", and the name of every backend."""
    return (*RESERVED, *BACKENDS)


def preference(spec: AttentionSpec, target: Target) -> Sequence[str]:
    """The backends worth trying for `spec` on `target`, the best first, as each says of itself.

    With flash-attn 2 and cuDNN alone this is the order of NeMo and Transformer Engine: cuDNN first on Hopper and later,
    flash-attn first on Ampere. Where flash-attn 3 or 4 is there, the order on Hopper is what an H100 measured.
    """
    places = {name: backend.place(spec, target) for name, backend in BACKENDS.items()}
    worth_trying = [(place, name) for name, place in places.items() if place is not None]
    return [name for _, name in sorted(worth_trying, key=lambda item: item[0])]


@dataclass(frozen=True)
class Choice:
    """The outcome of a selection: the backend taken, if any, and why each of the others was not."""

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
            ConfigError: there is none; it lists every backend with its reason.
        """
        if self.backend is None:
            raise ConfigError(
                f"attention_backend={self.asked!r} cannot serve {self.spec} on {self.target.name}: "
                + "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            )
        return self.backend

    @property
    def measured(self) -> bool:
        """Which of the candidates serves is decided by timing them when a call runs."""
        return self.asked == "measured" and len(self.candidates) > 1

    def rows(self) -> list[tuple[str, str, str]]:
        """Each backend in order of preference: name, "chosen", "kept", "dropped" or "not asked for", and the reason.

        One that is not dropped has none, but may have a note on its package's version there.
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
        """The choice as JSON values; `backend` is None if none serves, or if that is still to be measured."""
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
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows())
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        caption = html.escape(f"{self.spec} on {self.target.name}")
        head = "<tr><th>backend</th><th>verdict</th><th>reason</th></tr>"
        return f"<table><caption>{caption}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def explain(spec: AttentionSpec, target: Target, backend: str = "auto") -> Choice:
    """Says which backend serves `spec` on `target`, and why the others do not.

    Args:
        backend: "auto" takes the first in the order of `preference`; a name allows only that one; "measured" is "auto"
            here, as the times are taken when a call runs.

    Raises:
        ConfigError: `backend` is none of these.
    """
    if backend not in backend_choices():
        raise ConfigError(f"attention_backend={backend!r}: {unknown('backend', backend, backend_choices())}")
    if switches.must_be_deterministic():
        spec = replace(spec, deterministic=True)
    candidates: list[str] = []
    reasons: dict[str, str] = {}
    for name in _order(spec, target):
        if backend in BACKENDS and name != backend:
            continue
        off = switches.turned_off(BACKENDS[name])
        reason = f"turned off by {off}=0" if off else BACKENDS[name].why_not(spec, target)
        if reason is None:
            candidates.append(name)
        else:
            reasons[name] = reason
    return Choice(spec, target, backend, tuple(candidates), reasons)


def _order(spec: AttentionSpec, target: Target) -> list[str]:
    """Every backend in order of preference; those that are not worth trying come last."""
    order = preference(spec, target)
    return [*order, *(name for name in BACKENDS if name not in order)]


def select(spec: AttentionSpec, target: Target, backend: str = "auto") -> str:
    """The name of the backend that serves `spec` on `target`, logged the first time.

    Raises:
        ConfigError: no backend can, or the one named cannot; it lists every reason.
    """
    return _select(spec, target, backend, switches.setting())


@lru_cache(maxsize=1024)
def _select(spec: AttentionSpec, target: Target, backend: str, _setting: switches.Setting) -> str:
    name = explain(spec, target, backend).required()
    logger.info("attention: %s on %s for %s", name, target.name, spec)
    return name
