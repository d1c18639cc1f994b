"""The product of a large tensor and a factor that is nearly always 1."""

from __future__ import annotations

from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def multiply_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies a contiguous x in place by a factor without dimensions; where it is 1, x is not read.

    The host does not wait for a GPU to know the factor: programs on the GPU look at it.
    """
    if x.is_cpu:
        if float(factor) != 1:
            return x.mul_(factor)
        torch.autograd.graph.increment_version(x)  # so that a second backward pass over it is refused all the same
        return x
    if not (x.is_cuda and HAS_TRITON):
        return x.mul_(factor)
    from fiddlehead.models.scaled_kernel import multiply_ as on_gpu

    return on_gpu(x, factor)
