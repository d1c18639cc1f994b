"""NeMo-Run is imported before the tests of its parts."""

from __future__ import annotations

import importlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what NeMo-Run imports
    importlib.import_module("nemo_run")
