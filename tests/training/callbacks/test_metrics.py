"""The conversion of a rate to FLOPs and MFU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fiddlehead import tasks
from fiddlehead.models import TransformerConfig
from fiddlehead.training.callbacks.metrics import speed
from tests.training.conftest import rows

CONFIG = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100)


def test_both_utilizations_are_parts_of_the_peak():
    T, L, H, D = 32, 2, 4, 16
    matrices = L * (4 * 64 * 64 + 3 * 64 * 256) + 64 * 100  # queries, keys, values, output; three of SwiGLU; the head
    rates = speed(CONFIG, T, tokens_per_s=8e6, devices=4, peak=312e12)
    assert rates["tokens_per_s"] == 8e6
    assert rates["tflops_per_s"] == pytest.approx(2e6 * (6 * matrices + 6 * L * H * D * T) / 1e12)
    assert rates["mfu"] == pytest.approx(rates["tflops_per_s"] / 312)
    assert rates["mfu_full"] == pytest.approx(2e6 * (6 * matrices + 12 * L * H * D * T) / 312e12)
    assert "mfu" not in speed(CONFIG, T, 8e6, 4, 0.0)


def test_lightnings_sanity_check_changes_nothing_of_what_is_logged(parts: Callable[..., dict[str, Any]]) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2}
    plain = tasks.pretrain(**parts(name="plain", **settings))
    made = parts(name="checked", **settings)
    made["trainer"].num_sanity_val_steps = 2
    checked = tasks.pretrain(**made)
    assert rows(checked, "step", "loss", "val_loss") == rows(plain, "step", "loss", "val_loss")
