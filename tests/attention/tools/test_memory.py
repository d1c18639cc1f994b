"""The computed memory of a layer, against measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fiddlehead.attention import BACKENDS, AttentionSpec, attend
from fiddlehead.attention.tools.memory import extra_bytes
from tests.allocated import Allocated

SPEC = AttentionSpec(dtype=torch.bfloat16, head_dim=128, num_attention_heads=8, num_query_groups=2)
MEASURED = {
    "flash3": (44, 89, 178, 355),
    "flash4": (44, 89, 178, 355),
    "flash2": (52, 105, 209, 418),
    "cudnn": (52, 93, 185, 419),
}
"""MiB on an H100, forward and backward, one sequence of 4k, 8k, 16k and 32k."""


@pytest.mark.parametrize("backend", MEASURED)
def test_the_memory_is_what_an_h100_measured(backend: str) -> None:
    for measured, length in zip(MEASURED[backend], (4096, 8192, 16384, 32768), strict=True):
        assert extra_bytes(backend, SPEC, 1, length) / 2**20 == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("backend", ["reference", "sdpa_flash"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": (100, 0)},
        {"softcap": 5.0},
        {"dropout": 0.1},
        {"dtype": torch.float32},
        {"num_query_groups": 8},
        {"packed": True},
        {"packed": True, "window_size": (100, 0)},
    ],
    ids=str,
)
def test_the_memory_is_what_a_cpu_allocates(backend: str, options: dict[str, Any]) -> None:
    spec = replace(SPEC, head_dim=64, **options)
    if backend == "sdpa_flash" and (spec.softcap or spec.dropout):
        pytest.skip("it has neither")
    B, T, D = 2, 512, spec.head_dim
    q, k, v, gradient = (
        torch.randn(*((B * T,) if spec.packed else (B, T)), heads, D, dtype=spec.dtype, requires_grad=True)
        for heads in (8, spec.num_query_groups, spec.num_query_groups, 8)
    )
    borders: dict[str, Any] = {}
    if spec.packed:
        borders = {"cu_seqlens_q": torch.arange(0, B + 1, dtype=torch.int32) * T, "max_seqlen_q": T}
    features: dict[str, Any] = {"window_size": spec.window_size, "softcap": spec.softcap, "dropout": spec.dropout}
    with Allocated() as allocated:
        out = attend(q, k, v, backend=backend, **features, **borders)
        torch.autograd.grad(out, (q, k, v), gradient)
    assert extra_bytes(backend, spec, B, T, device_type="cpu") == pytest.approx(allocated.peak, rel=0.2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_reference_is_quadratic_in_the_length(backend: str) -> None:
    once, twice = (extra_bytes(backend, SPEC, 1, length) for length in (65536, 131072))
    assert twice / once == pytest.approx(4 if backend == "reference" else 2, rel=0.01)
    assert extra_bytes(backend, SPEC, 2, 65536) == 2 * once
    inference = replace(SPEC, training=False)
    assert 65536 * 8 * 128 * 2 < extra_bytes(backend, inference, 1, 65536) < once


def test_memory_grows_with_key_value_heads_and_determinism() -> None:
    for backend in ("flash2", "flash4", "sdpa_efficient"):
        multi_head = extra_bytes(backend, replace(SPEC, num_query_groups=8), 1, 4096)
        kv = 2 * 6 * 4096 * 128 * 2  # the gradients of k and v of six more heads
        assert multi_head < extra_bytes(backend, SPEC, 1, 4096) + kv  # without the buffers that groups need
    assert extra_bytes("flash2", replace(SPEC, deterministic=True), 1, 4096) > extra_bytes("flash2", SPEC, 1, 4096)
    padded = replace(SPEC, padding_mask=True)
    assert extra_bytes("cudnn", padded, 1, 4096) - extra_bytes("cudnn", SPEC, 1, 4096) == 4096**2 * 2
