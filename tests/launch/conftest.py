"""Fixtures for the tests of launches."""

from __future__ import annotations

import importlib
import warnings

import pytest

from tests.training.conftest import dataset

__all__ = ["dataset", "nemo_run"]


@pytest.fixture(scope="session")
def nemo_run() -> None:
    """NeMo-Run is imported, with the warnings of what it imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("nemo_run")
