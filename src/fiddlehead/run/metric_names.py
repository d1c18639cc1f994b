"""The names of metrics: flat columns in `metrics.csv`, and in groups (`train/loss`) for TensorBoard, W&B and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

V = TypeVar("V")

_TRAIN = frozenset({"loss", "lr", "grad_norm", "tokens"})
_PERFORMANCE = frozenset({"tokens_per_s", "tflops_per_s", "mfu", "mfu_full", "memory_gib"})


def grouped_name(column: str) -> str:
    """The name of a column in a group: `val_loss` is `val/loss`. A name that is not ours stays as it is."""
    if column.startswith("val_"):
        return f"val/{column.removeprefix('val_')}"
    if column in _TRAIN:
        return f"train/{column}"
    return f"perf/{column}" if column in _PERFORMANCE or column.startswith("seconds_") else column


def grouped(metrics: Mapping[str, V]) -> dict[str, V]:
    """The metrics of a row by their names in groups."""
    return {grouped_name(column): value for column, value in metrics.items()}


def column(name: str) -> str:
    """The column of a name in a group; a name that is not ours stays as it is."""
    group, _, rest = name.partition("/")
    found = f"val_{rest}" if group == "val" else rest
    return found if rest and grouped_name(found) == name else name
