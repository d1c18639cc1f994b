"""A device is known by its whole name and its memory; what no data sheet says of it is not known."""

from __future__ import annotations

import pytest

from fiddlehead.plan.cards import CARDS, PCIE, Card
from fiddlehead.training.callbacks.metrics import speed
from tests.training.callbacks.test_metrics import CONFIG


@pytest.mark.parametrize(
    ("name", "gib", "peak", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, 989e12, 3350e9),
        ("NVIDIA H100 PCIe", 79.2, 756e12, 2000e9),
        ("NVIDIA H100 NVL", 93.0, 835e12, 3900e9),
        ("NVIDIA H200 NVL", 139.8, 835e12, 4800e9),
        ("NVIDIA GH200 480GB", 94.5, 989e12, 4000e9),
        ("NVIDIA GH200 144G HBM3e", 140.0, 989e12, 0),
        ("NVIDIA H20", 95.0, 148e12, 4000e9),
        ("NVIDIA GB200", 184.0, 2500e12, 8000e9),
        ("NVIDIA A100-SXM4-80GB", 79.1, 312e12, 2039e9),
        ("NVIDIA A100-SXM4-40GB", 39.4, 312e12, 1555e9),
        ("NVIDIA A100-PCIE-40GB", 39.4, 312e12, 1555e9),
        ("NVIDIA A100 80GB PCIe", 79.2, 312e12, 0),
        ("NVIDIA A10G", 22.1, 70e12, 600e9),
        ("NVIDIA A10", 22.0, 125e12, 600e9),
        ("NVIDIA L40S", 44.4, 362e12, 864e9),
        ("NVIDIA L4", 22.0, 121e12, 300e9),
        ("NVIDIA GeForce RTX 4090", 23.6, 165e12, 1008e9),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, 165e12, 0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8, 0, 0),
        ("NVIDIA RTX A1000", 8.0, 0, 0),
        ("NVIDIA RTX A3000", 6.0, 0, 0),
        ("Tesla V100-SXM2-16GB", 15.8, 0, 0),
    ],
)
def test_a_device_is_the_card_of_its_name_and_memory(name: str, gib: float, peak: float, bandwidth: float):
    card = Card.of_device(name, int(gib * 2**30))
    assert (card.name, card.flops, card.bytes_per_s) == (name, peak, bandwidth)
    assert card.gib == pytest.approx(gib)
    assert ("mfu" in speed(CONFIG, 32, 8e6, 4, card.flops)) == bool(peak)


@pytest.mark.parametrize(
    ("name", "sparse", "gigabytes", "nvlink", "watts"),
    [
        ("h100_nvl", 1671, 3900, 600, 400),
        ("h20", 296, 4000, 900, 400),
        ("a30", 330, 933, None, 165),
        ("l4", 242, 300, None, 72),
        ("l40", 362, 864, None, 300),
        ("l40s", 733, 864, None, 350),
        ("rtx4090", 330, 1008, None, 450),
        ("gb200", 5000, 8000, 1800, 1200),
        ("b300", 4500, 8000, 1800, 1100),
        ("gb300", 5000, 8000, 1800, 1400),
    ],
)
def test_a_card_has_the_figures_of_its_data_sheet(
    name: str, sparse: float, gigabytes: float, nvlink: float | None, watts: float
):
    """Data sheets have products with sparsity, and both directions of NVLink; None: it has none, or not for all."""
    card = CARDS[name]
    assert card.flops == pytest.approx(sparse / 2 * 1e12, rel=0.02)
    assert (card.bytes_per_s, card.watts) == (gigabytes * 1e9, watts)
    assert card.link_bytes_per_s == (PCIE if nvlink is None else nvlink / 2 * 1e9)


def test_a_device_has_the_links_and_the_kernels_of_its_card():
    card = Card.of_device("NVIDIA H100 80GB HBM3", int(79.2 * 2**30))
    assert (card.link_bytes_per_s, card.watts) == (CARDS["h100"].link_bytes_per_s, 700)
    assert card.target is not None and card.target.name == "h100"
    assert Card.of_device("NVIDIA L4", 22 * 2**30).link_bytes_per_s < 100e9  # it has no NVLink


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("h100", "h100"),
        ("H100", "h100"),
        ("nvidia_h100_80gb_hbm3", "h100"),
        ("nvidia_h100_pcie", "h100_pcie"),
        ("A100-SXM4-40GB", "a100_40"),
        ("a100_80gb", "a100"),
        ("a100-sxm4", "a100"),
        ("rtx_4090", "rtx4090"),
        ("a10g", "a10g"),
        ("nvidia_a100_1g.5gb", None),
        ("tesla", None),
        ("", None),
    ],
)
def test_a_cluster_s_name_of_a_gpu_is_understood(name: str, card: str | None):
    assert Card.called(name) == (None if card is None else CARDS[card])
