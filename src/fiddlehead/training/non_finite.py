"""Steps whose loss or gradient is infinite or not a number."""

from __future__ import annotations

import torch

from fiddlehead.errors import RunError


class NonFiniteError(RunError):
    """The loss or the gradient of a step is infinite or not a number."""


class FirstNonFinite:
    """The first step whose loss or gradient was not finite. It is kept on the device, as looking at it stalls a GPU."""

    def __init__(self) -> None:
        self._step: torch.Tensor | None = None

    def note(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Notes the number of a step, 1 or more, if it is the first of which one of these is not finite."""
        bad = ~(grad_norm.isfinite() & loss.isfinite())
        if self._step is None:
            self._step = torch.full((), -1, dtype=torch.int64, device=bad.device)
        self._step = torch.where(bad & (self._step < 0), step, self._step)

    def look(self) -> int | None:
        """Its number; None if there is none yet. Waits for the device."""
        step = -1 if self._step is None else int(self._step)
        return step if step >= 0 else None
