"""Rules and helpers that the backends for PyTorch's own kernels share.

They call the operator of one kernel directly: `scaled_dot_product_attention` would choose among the kernels itself, and
its context manager for choosing costs more time than a small kernel takes and changes the state of the whole process.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fiddlehead.attention.spec import AttentionSpec, Target

HALF = (torch.float16, torch.bfloat16)


def first(rules: Iterable[tuple[object, str]]) -> str | None:
    """The reason of the first rule whose condition holds; None if none does."""
    return next((reason for holds, reason in rules if holds), None)


def outside(target: Target, lowest: int, highest: int) -> tuple[bool, str]:
    """The rule on the GPU: its compute capability, written as in "sm90", from `lowest` to `highest`."""
    if target.device_type != "cuda":
        return True, f"needs an NVIDIA GPU, not {target.device_type}"
    return not lowest <= target.sm <= highest, f"sm{target.sm}: made for sm{lowest} to sm{highest}"


def dtype_name(spec: AttentionSpec) -> str:
    """The dtype without "torch."."""
    return str(spec.dtype).removeprefix("torch.")


def hiding(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bias of the scores that hides the keys where `mask` is false.

    It is finite, because infinity minus infinity is NaN: a query that sees no key gets finite weights, and `seen`
    removes its output. A quarter of the lowest number leaves room for the kernels' factor of log2(e).
    """
    lowest = torch.finfo(dtype).min / 4
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
