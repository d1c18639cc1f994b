"""What a run changes in its process, and leaves as it was."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fiddlehead.run import signals


@contextmanager
def process_restored() -> Iterator[None]:
    """Restores, when the block ends or fails, what a run sets for the whole process.

    That is the random numbers of Python, NumPy and PyTorch, the environment's variables (Lightning's seeding,
    its launchers, PyTorch's compiler and `keep_compiled_kernels` each set some), the handlers of signals, and
    Python's garbage collector.
    """
    variables = dict(os.environ)
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
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        if collects and not gc.isenabled():
            gc.unfreeze()
            gc.enable()
