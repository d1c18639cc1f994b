"""Applies PyTorch's autocast rules to operations that autocast does not know."""

from __future__ import annotations

import torch


def autocasts(x: torch.Tensor) -> bool:
    """Whether matrix products with x use autocast's dtype."""
    # The compiler traces through this, so the devices that autocast knows are named and not asked for.
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product with x."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of products, and of attention's inputs, for a trainer's precision."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32
