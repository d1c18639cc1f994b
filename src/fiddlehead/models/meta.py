"""Models without values, of which only the shapes count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLING = {"normal_", "uniform_", "kaiming_uniform_", "zeros_", "zero_", "ones_", "fill_"}
"""Of `torch.nn.init` and `torch.Tensor`."""


@contextmanager
def shapes_only() -> Iterator[None]:
    """In the block, modules are made on the meta device and not initialized, which would take most of the time."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _FILLING:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
