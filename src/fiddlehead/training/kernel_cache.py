"""Where compiled kernels are kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path

from fiddlehead.environment import kernel_folders
from fiddlehead.run.console import say


def keep_compiled_kernels() -> None:
    """Lets this process find what earlier ones compiled, and keep what it compiles, in the cache folder.

    PyTorch's own choice is a folder in /tmp, which on clusters is often each job's own. Another that is set stays.
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
