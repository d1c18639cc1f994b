"""Which backend serves a call, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch

from fiddlehead.attention import BACKENDS, AttentionSpec, Target, attend, explain, select
from fiddlehead.attention import selection as selection_module
from fiddlehead.errors import ConfigError

CPU = Target("cpu")
SPEC = AttentionSpec(torch.float32, head_dim=8, num_attention_heads=4, num_query_groups=2)


def backend(reason: str | None) -> SimpleNamespace:
    return SimpleNamespace(why_not=lambda spec, target: reason, run=None)


@pytest.fixture
def three_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two that cannot serve anything, and one that can."""
    backends = {"fast": backend("needs a newer GPU"), "slow": backend(None), "slowest": backend(None)}
    monkeypatch.setattr(selection_module, "BACKENDS", backends)
    select.cache_clear()
    yield
    select.cache_clear()


def test_the_first_that_can_is_taken_and_the_others_are_explained(three_backends: None) -> None:
    choice = explain(SPEC, CPU)
    assert choice.backend == "slow" == select(SPEC, CPU)
    assert choice.reasons == {"fast": "needs a newer GPU"}
    assert (choice.spec, choice.target) == (SPEC, CPU)


def test_a_named_backend_is_taken_or_refused_but_never_replaced(three_backends: None) -> None:
    assert select(SPEC, CPU, "slowest") == "slowest"
    assert explain(SPEC, CPU, "fast").backend is None
    with pytest.raises(ConfigError, match="attention_backend='fast' cannot serve this call: fast: needs a newer GPU"):
        select(SPEC, CPU, "fast")


def test_an_unknown_backend_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'spda'; did you mean 'sdpa'"):
        explain(SPEC, CPU, "spda")
    with pytest.raises(ConfigError, match="did you mean 'auto'"):
        select(SPEC, CPU, "atuo")


def test_specs_and_targets_are_values() -> None:
    assert hash(SPEC) == hash(AttentionSpec(torch.float32, 8, 4, 2))
    with pytest.raises(FrozenInstanceError):
        SPEC.head_dim = 16  # type: ignore[misc]
    assert Target.of(torch.zeros(1)) == CPU
    assert Target.of(torch.zeros(1, device="meta")) == Target("meta")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", list(BACKENDS))
def test_what_a_backend_says_of_itself_is_true(
    name: str, groups: int, dropout: float, causal: bool, dtype: torch.dtype
) -> None:
    """What it accepts, it runs; what it refuses, it could not have run, or not rightly."""
    spec = AttentionSpec(dtype, 8, 4, groups, causal, dropout)
    reason = BACKENDS[name].why_not(spec, CPU)
    q, k = torch.ones(1, 3, 4, 8, dtype=dtype), torch.ones(1, 3, groups, 8, dtype=dtype)
    v = torch.tensor([0, 1, 1]).to(dtype)[None, :, None, None].expand_as(k).contiguous()
    if reason is None:
        out = attend(q, k, v, causal=causal, dropout=dropout, backend=name)
        assert out.dtype == dtype and out.isfinite().all()
        return
    assert str(dtype) in reason
    try:
        out = BACKENDS[name].run(q, k, v, spec, 1.0)
    except (RuntimeError, TypeError):
        return
    assert out[0, 1, 0, 0] not in (0.5, 2 / 3)  # the mean of what the second query sees: 0 and 1, or 0, 1 and 1
