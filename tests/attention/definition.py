"""Attention by its definition, in NumPy, one query at a time: it shares no code with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Array = np.ndarray


def one_sequence(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    real: Array | None = None,
    scale: float | None = None,
) -> Array:
    """q (T, H, D), k and v (S, G, D); `alibi_slopes` and `sinks` (H,); `real` (S,), false where a key is padding."""
    (T, H, D), (S, G, _) = q.shape, k.shape
    left, right = window_size
    out = np.zeros_like(q)
    keys = np.arange(S)
    for t, h in np.ndindex(T, H):
        position = t + S - T
        sees = np.ones(S, dtype=bool) if real is None else real.copy()
        if causal or right >= 0:
            sees &= keys <= position + (0 if causal else right)
        if left >= 0:
            sees &= keys >= position - left
        if not sees.any():
            continue
        score = k[sees, h // (H // G)] @ q[t, h] * (1 / math.sqrt(D) if scale is None else scale)
        if softcap:
            score = softcap * np.tanh(score / softcap)
        if alibi_slopes is not None:
            score = score - alibi_slopes[h] * np.abs(position - keys[sees])
        weight = np.exp(score)
        weight /= weight.sum() + (0 if sinks is None else np.exp(sinks[h]))
        out[t, h] = weight @ v[sees, h // (H // G)]
    return out


@dataclass(frozen=True)
class Call:
    """A call of `attend` whose tensors are drawn from `seed`."""

    B: int = 2
    T: int = 5
    S: int = 7
    G: int = 2
    R: int = 2
    """Query heads to a key/value head: H = G x R."""
    D: int = 8
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    padding: bool = False
    scale: float | None = None
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """q, k, v; and sinks, where there are any."""
        generator = torch.Generator().manual_seed(self.seed)
        H = self.G * self.R
        shapes = [(self.B, self.T, H, self.D), *[(self.B, self.S, self.G, self.D)] * 2]
        shapes += [(H,)] if self.sinks else []
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def arguments(self) -> dict[str, Any]:
        """What goes with the inputs by keyword."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "scale": self.scale,
            "alibi_slopes": torch.rand(self.G * self.R, generator=generator) if self.alibi else None,
            "padding_mask": torch.rand(self.B, self.S, generator=generator) < 0.6 if self.padding else None,
        }

    def defined(self) -> Array:
        """What the definition says of the float64 inputs."""
        q, k, v, *sinks = (x.numpy() for x in self.inputs())
        arguments = self.arguments()
        slopes, real = arguments.pop("alibi_slopes"), arguments.pop("padding_mask")
        return np.stack(
            [
                one_sequence(
                    q[b],
                    k[b],
                    v[b],
                    alibi_slopes=None if slopes is None else slopes.double().numpy(),
                    sinks=sinks[0] if sinks else None,
                    real=None if real is None else real[b].numpy(),
                    **arguments,
                )
                for b in range(self.B)
            ]
        )


windows = st.sampled_from([(-1, -1), (-1, -1), (0, 0), (1, 0), (3, -1), (-1, 1), (2, 2)])


@st.composite
def calls(draw: st.DrawFn, **fixed: Any) -> Call:
    """Any call, but for what is `fixed`."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "B": st.integers(1, 3),
        "T": st.integers(1, 9),
        "G": st.integers(1, 3),
        "R": st.integers(1, 4),
        "D": st.sampled_from([1, 2, 5, 8, 16]),
        "causal": st.booleans(),
        "window_size": windows,
        "softcap": st.sampled_from([0.0, 0.0, 1.5]),
        "alibi": st.booleans(),
        "sinks": st.booleans(),
        "padding": st.booleans(),
        "scale": st.sampled_from([None, 0.3]),
        "seed": st.integers(0, 99),
    }
    values: dict[str, Any] = fixed | {name: draw(strategy) for name, strategy in drawn.items() if name not in fixed}
    more = draw(st.sampled_from([0, 0, 1, 5] if values["causal"] else [0, 0, 1, 5, -1]))
    values.setdefault("S", max(1, values["T"] + more))
    return Call(**values)
