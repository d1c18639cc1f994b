"""Fixtures of a small run."""

from tests.training.conftest import dataset, one, parts, pretrain

__all__ = ["dataset", "one", "parts", "pretrain"]
