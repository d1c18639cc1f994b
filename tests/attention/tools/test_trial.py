"""Trials of a kernel: the errors that they find, and when no trial is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddlehead.attention import BACKENDS, AttentionSpec, Target
from fiddlehead.attention.tools.trial import require_right, trial, wrong
from fiddlehead.errors import ConfigError

CPU = torch.device("cpu")
SPEC = AttentionSpec(dtype=torch.float32, head_dim=40, num_attention_heads=6, num_query_groups=2)
CALLS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "inference": {"training": False},
    "more keys": {"same_length": False},
    "window": {"window_size": (4096, 0)},
    "window to both sides": {"causal": False, "window_size": (20, 4096)},
    "packed": {"packed": True},
    "packed with more keys": {"packed": True, "same_length": False},
    "padding": {"padding_mask": True},
    "alibi": {"alibi": True},
    "soft cap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.3},
    "cache": {"cached": True, "same_length": False, "training": False},
    "pages": {"cached": True, "same_length": False, "training": False, "page_size": 16},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention_trials.json"


@pytest.mark.parametrize("changes", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", ["sdpa_flash", "reference"])
def test_working_kernels_are_right_in_every_kind_of_call(backend: str, changes: dict[str, Any]) -> None:
    spec = replace(SPEC, **changes)
    if reason := BACKENDS[backend].why_not(replace(spec, dropout=0.0), Target.of(CPU)):
        pytest.skip(reason)
    errors = trial(backend, spec, CPU)
    names = ["out", "dq", "dk", "dv", "dsinks"][: 1 if not spec.training else 5 if spec.sinks else 4]
    assert list(errors) == names and not wrong(errors, spec) and max(errors.values()) > 0


def _ignoring(field: str, value: Any) -> Any:
    return lambda q, k, v, spec, *rest: BACKENDS["reference"].run(q, k, v, replace(spec, **{field: value}), *rest)


@pytest.mark.parametrize(
    ("changes", "run"),
    [
        ({"window_size": (4096, 0)}, _ignoring("window_size", (-1, -1))),
        ({"causal": False, "window_size": (-1, 4096)}, _ignoring("window_size", (-1, -1))),
        ({"softcap": 5.0}, _ignoring("softcap", 0.0)),
        ({"same_length": False}, _ignoring("causal", False)),
        (
            {"packed": True},
            lambda q, k, v, spec, scale, extras: BACKENDS["reference"].run(
                q,
                k,
                v,
                spec,
                scale,
                extras._replace(cu_seqlens_q=extras.cu_seqlens_q[[0, 2]], cu_seqlens_k=extras.cu_seqlens_k[[0, 2]]),
            ),
        ),
        (
            {"padding_mask": True},
            lambda q, k, v, spec, scale, extras: BACKENDS["reference"].run(
                q,
                k,
                v,
                spec,
                scale,
                extras._replace(padding_mask=torch.ones_like(extras.padding_mask)),
            ),
        ),
    ],
)
def test_what_a_kernel_leaves_out_is_seen(changes: dict[str, Any], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, **changes)
    monkeypatch.setattr(BACKENDS["sdpa_flash"], "run", run)
    assert "relative error of out" in (wrong(trial("sdpa_flash", spec, CPU), spec) or "")


def test_one_gradient_that_is_wrong_is_refused_by_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BACKENDS["reference"].run
    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS["sdpa_flash"], "run", lambda q, k, *rest: run(q, 2 * k - k.detach(), *rest))
        with pytest.raises(
            ConfigError, match=r"sdpa_flash': is wrong on cpu .*: relative error of dk 1\.0e\+00, above"
        ) as error:
            require_right("sdpa_flash", SPEC, Target.of(CPU), CPU)
    assert "dq" not in str(error.value) and "dv" not in str(error.value)
    require_right("sdpa_flash", SPEC, Target.of(CPU), CPU)  # what was wrong is tried again


def test_a_trial_is_kept_by_versions_device_and_spec(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[AttentionSpec] = []
    run = BACKENDS["sdpa_flash"].run

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, *rest: Any) -> torch.Tensor:
        calls.append(spec)
        return run(q, k, v, spec, *rest)

    monkeypatch.setattr(BACKENDS["sdpa_flash"], "run", counting)
    here = Target.of(CPU)
    errors = require_right("sdpa_flash", SPEC, here, CPU)
    assert require_right("sdpa_flash", SPEC, here, CPU) == errors and len(calls) == 1
    assert list(json.loads(cache.read_text()).values()) == [errors]
    require_right("sdpa_flash", replace(SPEC, head_dim=48), here, CPU)
    require_right("sdpa_flash", SPEC, replace(here, name="another"), CPU)
    require_right("sdpa_flash", SPEC, replace(here, packages=replace(here.packages, torch="2.0")), CPU)
    assert len(calls) == 4


def test_a_trial_leaves_the_random_numbers_of_the_run_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trial("sdpa_flash", replace(SPEC, padding_mask=True, sinks=False, dropout=0.1), CPU)
    assert torch.equal(torch.rand(3), expected)
