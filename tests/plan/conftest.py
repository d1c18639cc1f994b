"""Fixtures of a small run."""

import pytest

from tests.training.conftest import dataset, one, parts, pretrain

__all__ = ["dataset", "one", "parts", "pretrain"]


@pytest.fixture(autouse=True)
def not_calibrated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of this machine's GPU changes no plan."""
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path_factory.getbasetemp() / "not_calibrated"))
