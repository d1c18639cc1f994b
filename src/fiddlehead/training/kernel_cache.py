"""Where compiled kernels are kept from run to run."""

from __future__ import annotations

import os

from fiddlehead.environment import cache_folder

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton"}
"""The variables that PyTorch and Triton read, and the folders in ours that they are to name."""


def keep_compiled_kernels() -> None:
    """Lets this process find what earlier ones compiled, and keep what it compiles, in the cache folder.

    PyTorch's own choice is /tmp, which on clusters is often each job's own. What is set already stays.
    """
    for variable, folder in FOLDERS.items():
        os.environ.setdefault(variable, str(cache_folder() / folder))
