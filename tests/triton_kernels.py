"""Where the tests of Triton's kernels run: on a GPU, or in Triton's interpreter if TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
NEEDS_KERNELS = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"
)
DTYPES = [torch.float32, torch.float16, *([] if DEVICE == "cpu" else [torch.bfloat16])]
"""The interpreter rounds bfloat16 towards 0."""
