"""Keeps compiled kernels from run to run."""

from __future__ import annotations

import os
from pathlib import Path

from fiddlehead.environment import kernel_folders
from fiddlehead.run.console import say


def keep_compiled_kernels() -> None:
    """Makes this process read and write compiled kernels in the cache folder.

    PyTorch's default is a folder in /tmp, which on clusters often belongs to one job. Folders that are set already are
    kept.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    for variable, folder in kernel_folders().items():
        # Its own choice may be there too: parts of PyTorch set the variable when they are imported.
        if os.environ.get(variable) in (None, "", os.path.abspath(default_cache_dir())):  # noqa: PTH100  as it does
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                say(f"WARNING: compiled kernels are not kept, as {folder} cannot be made: {error.strerror}")
                continue
            os.environ[variable] = folder
