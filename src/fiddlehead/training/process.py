"""What a run changes in its process, and leaves as it was."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fiddlehead import signals
from fiddlehead.environment import kernel_folders


@contextmanager
def process_restored() -> Iterator[None]:
    """Restores, when the block ends or fails, what a run sets for the whole process.

    That is the random numbers of Python, NumPy and PyTorch, the variables that Lightning's seeding and
    `keep_compiled_kernels` set, the handlers of signals, and Python's garbage collector.
    """
    names = (*kernel_folders(), "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    variables = {name: os.environ.get(name) for name in names}
    collects = gc.isenabled()
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # asking would initialize them
    try:
        with signals.handlers_restored():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpus)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if collects and not gc.isenabled():
            gc.unfreeze()
            gc.enable()
