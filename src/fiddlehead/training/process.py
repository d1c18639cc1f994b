"""Restores the process-wide state that a run changes."""

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
    """Restores the process-wide settings of a run when the block ends or fails.

    These are the random states of Python, NumPy and PyTorch, environment variables (Lightning's seeding and launchers,
    PyTorch's compiler and `keep_compiled_kernels` set some), signal handlers, and Python's garbage collector.
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
