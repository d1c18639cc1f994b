"""`attention_backend="measured"`: backends are timed once, the times are kept, and random numbers do not change."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fiddlehead.attention import BACKENDS, AttentionSpec, Target, attend
from fiddlehead.attention.backends.backend import Backend, Extras
from fiddlehead.attention.tools.measure import fastest
from fiddlehead.attention.tools.sample import Shape

CPU = torch.device("cpu")
SPEC = AttentionSpec(dtype=torch.float32, head_dim=8, num_attention_heads=4, num_query_groups=2)
SHAPE = Shape(2, 16, 16)


class StandIn:
    """The reference, slowed down or broken, that counts its calls."""

    NAME: str = "stand_in"
    PLACE: int = 0
    SWITCHES: tuple[str, ...] = ()

    def place(self, spec: AttentionSpec, target: Target) -> float:
        return self.PLACE

    def __init__(self, seconds: float = 0.0, error: str | None = None) -> None:
        self.seconds, self.error, self.calls = seconds, error, 0

    def why_not(self, spec: AttentionSpec, target: Target) -> str | None:
        return None

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
    ) -> torch.Tensor:
        self.calls += 1
        if self.error:
            raise RuntimeError(self.error)
        if self.seconds:
            time.sleep(self.seconds)
        return BACKENDS["reference"].run(q, k, v, spec, scale, extras)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention.json"


def choose(candidates: dict[str, Backend], spec: AttentionSpec = SPEC, shape: Shape = SHAPE) -> str:
    return fastest(candidates, spec, Target.of(CPU), CPU, shape)


def test_the_fastest_is_taken_and_not_timed_again(cache: Path) -> None:
    slow, fast = StandIn(0.03), StandIn()
    assert choose({"slow": slow, "fast": fast}) == "fast"
    calls = slow.calls, fast.calls
    assert choose({"slow": slow, "fast": fast}) == "fast"
    assert (slow.calls, fast.calls) == calls
    (times,) = json.loads(cache.read_text()).values()
    assert times["slow"] > 30 > times["fast"] > 0


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (replace(SPEC, dropout=0.5), SHAPE),
        (SPEC, Shape(2, 64, 64)),
        (replace(SPEC, training=False), SHAPE),
    ],
)
def test_another_spec_or_size_is_timed_anew(cache: Path, spec: AttentionSpec, shape: Shape) -> None:
    one, other = StandIn(), StandIn()
    choose({"one": one, "other": other})
    choose({"one": one, "other": other}, spec, shape)
    assert len(json.loads(cache.read_text())) == 2


def test_a_little_longer_is_the_same_size(cache: Path) -> None:
    for length in (33, 40, 64):
        choose({"one": StandIn(), "other": StandIn()}, shape=Shape(2, length, length))
    assert len(json.loads(cache.read_text())) == 1


def test_a_candidate_that_fails_is_left_out_and_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose({"broken": StandIn(error="no kernel\nmore"), "works": StandIn(0.03)}) == "works"
    assert "broken is left out, its timing failed: no kernel" in caplog.text


def test_the_reference_is_not_timed_beside_others(cache: Path) -> None:
    reference = StandIn()
    assert choose({"reference": reference, "slow": StandIn(0.03)}) == "slow"
    assert reference.calls == 0
    assert choose({"reference": reference}) == "reference"


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, dropout=0.1),
        replace(SPEC, packed=True, sinks=True),
        replace(SPEC, alibi=True, padding_mask=True),
        replace(SPEC, training=False, cached=True),
        replace(SPEC, training=False, cached=True, page_size=4),
    ],
    ids=str,
)
def test_every_kind_of_call_can_be_timed_and_draws_no_random_numbers(cache: Path, spec: AttentionSpec) -> None:
    before = torch.get_rng_state()
    one, other = StandIn(), StandIn(0.03)
    assert choose({"one": one, "other": other}, spec) == "one"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("content", ["", "[1", "{}"])
def test_a_damaged_cache_is_begun_anew(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert choose({"one": StandIn(), "other": StandIn(0.03)}) == "one"
    assert len(json.loads(cache.read_text())) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    assert choose({"one": StandIn(), "other": StandIn(0.03)}) == "one"
    assert "not kept" in caplog.text


def test_attend_measures_also_while_it_is_traced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow, fast = StandIn(0.03), StandIn()
    monkeypatch.setitem(BACKENDS, "sdpa_flash", slow)
    monkeypatch.setitem(BACKENDS, "sdpa_efficient", fast)
    caplog.set_level(logging.INFO)
    for length, wrap in ((24, lambda call: call), (48, compiled)):
        q, k = torch.randn(2, length, 4, 8), torch.randn(2, length, 2, 8)
        out = wrap(lambda q, k: attend(q, k, k, backend="measured"))(q, k)
        torch.testing.assert_close(out, attend(q, k, k, backend="reference"))
        assert f"length_q={length}" in caplog.text


def compiled(function):
    return torch.compile(function, backend="eager", fullgraph=True)
