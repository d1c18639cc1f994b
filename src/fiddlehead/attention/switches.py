"""The environment variables that turn backends off, as in NVIDIA's Transformer Engine."""

from __future__ import annotations

import os

import torch

SWITCHES = {
    "NVTE_FLASH_ATTN": ("flash2", "flash3", "flash4", "sdpa_flash"),
    "NVTE_FLASH_ATTN_V2": ("flash2",),
    "NVTE_FLASH_ATTN_V3": ("flash3",),
    "NVTE_FLASH_ATTN_V4": ("flash4",),
    "NVTE_FUSED_ATTN": ("cudnn",),
    "NVTE_UNFUSED_ATTN": ("reference",),
}
"""Each variable, and the backends that it turns off when it is 0."""
DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"

Setting = tuple[object, ...]
"""The values of all the variables at one moment."""

# The dictionary inside os.environ: asking it takes a tenth of the time, and torch.compile sees when it changes.
_environ: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]


def setting() -> Setting:
    """What the variables say now; it is part of what a selection depends on."""
    get = _environ.get  # each written out: this is asked at every call, and a loop would take three times as long
    return (
        get(b"NVTE_FLASH_ATTN"),
        get(b"NVTE_FLASH_ATTN_V2"),
        get(b"NVTE_FLASH_ATTN_V3"),
        get(b"NVTE_FLASH_ATTN_V4"),
        get(b"NVTE_FUSED_ATTN"),
        get(b"NVTE_UNFUSED_ATTN"),
        get(b"NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
        torch.are_deterministic_algorithms_enabled(),
    )


def turned_off() -> dict[str, str]:
    """The backends that are turned off, and by which variable."""
    return {
        backend: variable
        for variable, backends in SWITCHES.items()
        if os.environ.get(variable) == "0"
        for backend in backends
    }


def must_be_deterministic() -> bool:
    """Whether PyTorch's flag or Transformer Engine's variable asks for the same gradients each time."""
    return torch.are_deterministic_algorithms_enabled() or os.environ.get(DETERMINISM) == "0"
