"""The conversion of a rate to FLOPs and MFU."""

from __future__ import annotations

import pytest
import torch

from fiddlehead.models import TransformerConfig
from fiddlehead.training.callbacks.metrics import peak_flops, speed

CONFIG = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100)
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A3000", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_both_utilizations_are_parts_of_the_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    T, L, H, D = 32, 2, 4, 16
    matrices = L * (4 * 64 * 64 + 3 * 64 * 256) + 64 * 100  # queries, keys, values, output; three of SwiGLU; the head
    rates = speed(CONFIG, T, tokens_per_s=8e6, devices=4, device=GPU)
    assert rates["tokens_per_s"] == 8e6
    assert rates["tflops_per_s"] == pytest.approx(2e6 * (6 * matrices + 6 * L * H * D * T) / 1e12)
    assert rates["mfu"] == pytest.approx(rates["tflops_per_s"] / 312)
    assert rates["mfu_full"] == pytest.approx(2e6 * (6 * matrices + 12 * L * H * D * T) / 312e12)
    assert "mfu" not in speed(CONFIG, T, 8e6, 4, torch.device("cpu"))
