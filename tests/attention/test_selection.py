"""The choice of the backend for a call, and its explanation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fiddlehead.attention import (
    BACKENDS,
    GPUS,
    AttentionSpec,
    Package,
    Packages,
    Target,
    attend,
    backend_choices,
    explain,
    select,
    selection,
    switches,
)
from fiddlehead.attention.backends import flex
from fiddlehead.errors import ConfigError

CPU = Target("cpu", "cpu", packages=Packages(torch="2.11.0", cudnn=None))
SPEC = AttentionSpec(dtype=torch.bfloat16, head_dim=128, num_attention_heads=32, num_query_groups=8)
NEMO = Packages(torch="2.11.0", cudnn="9.19.0", flash2=Package("2.8.3"))
"""What NeMo's users have: flash-attn 2 and cuDNN."""
ALL = replace(NEMO, flash3=Package("3.0.0"), flash4=Package("4.0.0b36"))
WITHOUT_3 = replace(ALL, flash3=Package())


@pytest.fixture(autouse=True)
def switches_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*switches.by_variable(), switches.DETERMINISM):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def three_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that cannot serve anything, and two that can."""

    def backend(reason: str | None) -> SimpleNamespace:
        return SimpleNamespace(SWITCHES=(), why_not=lambda spec, target: reason)

    backends = {"flash2": backend("needs a newer GPU"), "sdpa_flash": backend(None), "reference": backend(None)}
    monkeypatch.setattr(selection, "BACKENDS", backends)
    monkeypatch.setattr(selection, "preference", lambda spec, target: ("flash2", "sdpa_flash", "reference"))
    selection._select.cache_clear()
    yield
    selection._select.cache_clear()


def test_the_first_that_can_is_taken_and_the_others_are_explained(three_backends: None) -> None:
    choice = explain(SPEC, CPU)
    assert choice.backend == "sdpa_flash" == select(SPEC, CPU)
    assert choice.candidates == ("sdpa_flash", "reference")
    assert choice.reasons == {"flash2": "needs a newer GPU"}
    assert (choice.spec, choice.target) == (SPEC, CPU)


def test_a_named_backend_is_taken_or_refused_but_never_replaced(three_backends: None) -> None:
    assert select(SPEC, CPU, "reference") == "reference"
    assert explain(SPEC, CPU, "flash2").backend is None
    with pytest.raises(ConfigError, match=r"attention_backend='flash2': cannot serve .* flash2: needs a newer GPU$"):
        select(SPEC, CPU, "flash2")


def test_a_choice_is_logged_once(three_backends: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=selection.logger.name):
        for _ in range(3):
            select(SPEC, CPU)
    assert [record.getMessage() for record in caplog.records] == [f"attention: sdpa_flash on cpu for {SPEC}"]


def test_if_nothing_is_left_every_backend_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in switches.by_variable():
        monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError) as error:
        select(replace(SPEC, sinks=True, dropout=0.1), Target.gpu("a100", NEMO))
    for name in BACKENDS:
        assert f"{name}: " in str(error.value)
    assert "cudnn: turned off by NVTE_FUSED_ATTN=0" in str(error.value)


@pytest.mark.parametrize(("asked", "nearest"), [("spda_flash", "sdpa_flash"), ("atuo", "auto"), ("flash", "flash")])
def test_an_unknown_backend_is_refused_with_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown backend '{asked}'; did you mean '{nearest}"):
        explain(SPEC, CPU, asked)


def test_specs_and_targets_are_values() -> None:
    assert hash(SPEC) == hash(replace(SPEC)) and replace(SPEC) == SPEC != replace(SPEC, causal=False)
    with pytest.raises(FrozenInstanceError):
        SPEC.head_dim = 16  # type: ignore[misc]
    assert Target.of(torch.device("cpu")).device_type == "cpu"
    assert Target.gpu("H100", NEMO) == Target("cuda", "h100", (9, 0), NEMO)
    with pytest.raises(ConfigError, match="gpu='h10': unknown GPU 'h10'; did you mean 'h100'"):
        Target.gpu("h10")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("backend", backend_choices())
def test_every_backend_is_taken_or_has_a_reason_on_every_gpu(backend: str, gpu: str) -> None:
    choice = explain(SPEC, Target.gpu(gpu, NEMO), backend)
    assert {*choice.candidates, *choice.reasons} == ({backend} if backend in BACKENDS else set(BACKENDS))
    assert all(choice.reasons.values())


PREFERRED = [
    # With flash-attn 2 and cuDNN alone, NeMo's rule.
    ("a100", NEMO, {}, "flash2"),
    ("l40s", NEMO, {}, "flash2"),
    ("h100", NEMO, {}, "cudnn"),
    ("h200", NEMO, {"training": False}, "cudnn"),
    ("b200", NEMO, {}, "cudnn"),
    ("h100", NEMO, {"packed": True}, "flash2"),
    ("h100", NEMO, {"window_size": (1023, 0)}, "flash2"),
    ("h100", NEMO, {"deterministic": True}, "flash2"),
    ("h100", NEMO, {"head_dim": 256}, "flash2"),
    # Newer flash-attn comes first where it is made for the GPU.
    ("h100", replace(NEMO, flash3=Package("3.0.0")), {}, "flash3"),
    ("h100", replace(NEMO, flash4=Package("4.0.0b36")), {}, "flash4"),
    ("b200", ALL, {}, "flash4"),
    ("a100", ALL, {}, "flash2"),
    # On Hopper, short sequences in their own order.
    ("h100", ALL, {"head_dim": 64, "length": 1024}, "flash4"),
    ("h100", ALL, {"head_dim": 128, "length": 1024}, "cudnn"),
    ("h100", ALL, {"head_dim": 128, "length": 4096}, "flash3"),
    # Where flash-attn 4 pads its gradients.
    *(("h100", ALL, {"head_dim": head_dim, "length": 1024}, "cudnn") for head_dim in (40, 80, 112)),
    *(("h100", ALL, {"head_dim": head_dim, "length": 2048}, "flash3") for head_dim in (40, 80, 112)),
    *(("h100", WITHOUT_3, {"head_dim": head_dim, "length": 2048}, "cudnn") for head_dim in (40, 80, 112)),
    ("h100", WITHOUT_3, {"head_dim": 80, "length": 4096}, "flash4"),
    ("h100", WITHOUT_3, {"head_dim": 112, "length": 4096}, "cudnn"),
    ("h100", WITHOUT_3, {"head_dim": 112, "length": 8192}, "flash4"),
    ("h100", WITHOUT_3, {"head_dim": 80, "length": 2048, "packed": True}, "flash4"),
    ("h100", WITHOUT_3, {"head_dim": 80, "length": 2048, "training": False}, "flash4"),
    ("h100", WITHOUT_3, {"head_dim": 96, "length": 2048}, "flash4"),
    ("h100", ALL, {"head_dim": 64, "length": 1024, "training": False}, "cudnn"),
    ("h100", ALL, {"head_dim": 64, "length": 4096, "training": False}, "flash4"),
    ("h100", ALL, {"head_dim": 64, "length": 4096, "training": False, "num_query_groups": 32}, "flash3"),
    ("h100", ALL, {"head_dim": 64, "length": 8192, "training": False, "num_query_groups": 32}, "flash4"),
    # Nothing installed.
    ("a100", Packages("2.11.0", "9.19.0"), {}, "sdpa_flash"),
    ("h100", Packages("2.11.0", "9.19.0"), {}, "cudnn"),
    ("h100", Packages("2.11.0", "9.19.0"), {"packed": True}, "sdpa_flash"),
    ("t4", NEMO, {"dtype": torch.float16}, "sdpa_efficient"),
    ("a100", NEMO, {"dtype": torch.float64}, "reference"),
]


@pytest.mark.parametrize(("gpu", "packages", "changed", "taken"), PREFERRED)
def test_the_order_of_preference(gpu: str, packages: Packages, changed: dict[str, Any], taken: str) -> None:
    assert explain(replace(SPEC, **changed), Target.gpu(gpu, packages)).backend == taken


def test_newer_flash_attn_comes_first_on_hopper() -> None:
    assert set(explain(SPEC, Target.gpu("h100", ALL)).candidates[:2]) == {"flash3", "flash4"}


@pytest.mark.parametrize(("variable", "backends"), switches.by_variable().items())
def test_each_variable_turns_off_its_backends_and_no_other(
    variable: str, backends: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target.gpu("h100", ALL)
    before = explain(SPEC, target).candidates
    assert set(backends) <= set(before)
    monkeypatch.setenv(variable, "1")
    assert explain(SPEC, target).candidates == before
    monkeypatch.setenv(variable, "0")
    choice = explain(SPEC, target)
    assert choice.candidates == tuple(name for name in before if name not in backends)
    assert all(choice.reasons[name] == f"turned off by {variable}=0" for name in backends)


def test_a_change_between_two_selections_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.gpu("h100", NEMO)
    assert select(SPEC, target) == "cudnn"
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert select(SPEC, target) == "flash2"
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    assert select(SPEC, target) not in ("cudnn", "flash2", "sdpa_flash")
    monkeypatch.delenv("NVTE_FUSED_ATTN")
    assert select(SPEC, target) == "cudnn"


def test_gradients_that_must_repeat_leave_out_those_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.gpu("h100", NEMO)
    monkeypatch.setenv(switches.DETERMINISM, "0")
    assert explain(SPEC, target).spec.deterministic
    assert select(SPEC, target) == "flash2"
    monkeypatch.delenv(switches.DETERMINISM)
    assert select(SPEC, target) == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        assert select(SPEC, target) == "flash2"
    finally:
        torch.use_deterministic_algorithms(False)


def inputs() -> list[torch.Tensor]:
    return [torch.randn(1, 4, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]


def test_a_change_between_two_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    expected = attend(q, k, v, backend="sdpa_flash")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(ConfigError, match="sdpa_flash: turned off by NVTE_FLASH_ATTN=0"):
        attend(q, k, v, backend="sdpa_flash")
    monkeypatch.delenv("NVTE_FLASH_ATTN")
    assert torch.equal(attend(q, k, v, backend="sdpa_flash"), expected)


def test_a_change_between_two_calls_of_a_compiled_function_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "why_not", lambda spec, target: "left out of this test")
    selection._select.cache_clear()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    q, k, v = inputs()
    expected = compiled(q, k, v)
    assert torch.equal(compiled(q, k, v), expected) and counter.frame_count == 1
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    torch.testing.assert_close(compiled(q, k, v), expected)
    assert counter.frame_count == 2
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
    assert any("flash_attention_for_cpu" in name for name in targets[0])
    assert any("reference_forward" in name for name in targets[1])
    selection._select.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["sdpa_flash", "reference"])
def test_what_a_cpu_backend_says_of_itself_is_true(name: str, dropout: float, dtype: torch.dtype) -> None:
    """What it accepts, it runs; what it refuses, it could not have run, or not rightly."""
    spec = replace(SPEC, dtype=dtype, head_dim=8, num_attention_heads=4, num_query_groups=2, dropout=dropout)
    reason = BACKENDS[name].why_not(spec, CPU)
    q, k = torch.ones(1, 3, 4, 8, dtype=dtype), torch.ones(1, 3, 2, 8, dtype=dtype)
    v = torch.tensor([0, 1, 1]).to(dtype)[None, :, None, None].expand_as(k).contiguous()
    if reason is None:
        out = attend(q, k, v, dropout=dropout, backend=name)
        assert out.dtype == dtype and out.isfinite().all()
        return
    assert "dropout" in reason or str(dtype).removeprefix("torch.") in reason
    with pytest.raises(ConfigError):
        attend(q, k, v, dropout=dropout, backend=name)


@pytest.mark.parametrize("variable", [*switches.by_variable(), switches.DETERMINISM])
def test_every_variable_is_part_of_the_setting(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    before = switches.setting()
    monkeypatch.setenv(variable, "0")
    assert switches.setting() != before
