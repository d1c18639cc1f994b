"""How the kernels of a step are launched."""

from __future__ import annotations

import torch


def early(device: torch.device) -> dict[str, bool]:
    """The options of a kernel that may start before the one in front of it has ended."""
    is_new = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if is_new else {"EARLY": False}
