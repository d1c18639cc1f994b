"""The kernels of the embedding's gradient, and of a factor that is nearly always 1, against float64.

pytest -m gpu tests/models/test_rows_kernel.py
TRITON_INTERPRET=1 pytest tests/models/test_rows_kernel.py     without a GPU, where Triton is installed
"""

from __future__ import annotations

import pytest
import torch

from tests.triton_kernels import DEVICE, DTYPES, INTERPRETED, NEEDS_KERNELS

pytestmark = [
    pytest.mark.gpu,
    NEEDS_KERNELS,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # in the interpreter
]


def ids_of(kind: str, N: int, V: int) -> torch.Tensor:
    torch.manual_seed(N + V)
    ids = torch.randint(V, (N,), device=DEVICE)
    if kind == "frequent":  # nine of ten are one token, as are some of the others
        ids[torch.rand(N, device=DEVICE) < 0.9] = V // 2
        ids[: N // 20] = V - 1
    return torch.full_like(ids, V - 1) if kind == "one" else ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "frequent", "one"])
@pytest.mark.parametrize(
    ("N", "V", "C"), [(1, 1, 1), (31, 7, 3), (32, 50, 130), (33, 1, 513), (64, 9, 40), (97, 40, 8), (1600, 300, 24)]
)
def test_rows_are_summed_in_float32_and_added_with_one_rounding(
    N: int, V: int, C: int, kind: str, dtype: torch.dtype
) -> None:
    from fiddlehead.models.rows_kernel import add_rows_

    ids = ids_of(kind, N, V)
    rows, total = (torch.randn(size, C, device=DEVICE).to(dtype) for size in (N, V))
    exact = total.double().index_add(0, ids, rows.double())
    found = add_rows_(total.clone(), ids, rows)
    sizes = total.double().abs().index_add(0, ids, rows.double().abs())  # of what is added up
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() if dtype != torch.float32 else 0
    assert ((found.double() - exact).abs() <= rounding + 4e-7 * sizes).all()
    untouched = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill(0, ids, False)
    assert torch.equal(found[untouched], total[untouched])
    assert torch.equal(add_rows_(total.clone(), ids, rows), found)


def test_no_rows_change_nothing() -> None:
    from fiddlehead.models.rows_kernel import add_rows_

    total = torch.randn(5, 4, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert torch.equal(add_rows_(total.clone(), none, total[:0]), total)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("numbers", [0, 1, 4096, 10_001])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
def test_a_factor_multiplies_all_unless_it_is_1(factor: float, numbers: int, dtype: torch.dtype, monkeypatch) -> None:
    from fiddlehead.models import scaled_kernel

    monkeypatch.setattr(scaled_kernel, "PROGRAMS", 2)  # which take several turns
    x = torch.randn(numbers, device=DEVICE).to(dtype)
    by = torch.tensor(factor, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    found = scaled_kernel.multiply_(x.clone(), by)
    torch.testing.assert_close(found, (x.to(by.dtype) * by).to(dtype), rtol=2e-3 if INTERPRETED else 0, atol=0)
    if factor == 1:
        assert torch.equal(found, x)
