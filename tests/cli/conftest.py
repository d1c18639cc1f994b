"""Fixtures for the tests of commands."""

from __future__ import annotations

import importlib
import warnings

import pytest


@pytest.fixture(scope="session", autouse=True)
def _nemo_run() -> None:
    """NeMo-Run's dependencies warn of each other when they are imported; that is theirs to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("nemo_run")
