"""What `attend` computes, whichever backend runs it.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.attention import BACKENDS, AttentionSpec, attend
from fiddlehead.attention.selection import select
from fiddlehead.errors import ConfigError

TOLERANCES = {
    # Largest error beside the float64 reference of the same (rounded) inputs, outputs being of order 1.
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
}
GRADIENT_FACTOR = 8
"""Gradients sum over more terms than outputs, and their own size is up to a few times larger."""


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    S: int
    G: int
    R: int
    """Query heads to a key/value head: H = G x R."""
    D: int
    causal: bool

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        B, T, S, G, D = self.B, self.T, self.S, self.G, self.D
        shapes = ((B, T, G * self.R, D), (B, S, G, D), (B, S, G, D))
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


shapes = st.builds(
    lambda extra, T, **rest: Shape(T=T, S=T + extra, **rest),
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    extra=st.sampled_from([0, 0, 1, 5]),
    G=st.integers(1, 3),
    R=st.integers(1, 4),
    D=st.sampled_from([1, 2, 5, 8, 16]),
    causal=st.booleans(),
)
everywhere = pytest.mark.parametrize("backend", list(BACKENDS))


def numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, scale: float) -> np.ndarray:
    """The definition, a query at a time, with nothing in common with the code under test."""
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(B, T, H):
        g = h // (H // G)
        seen = S - T + t + 1 if causal else S
        weights = np.array([math.exp(scale * float(q[b, t, h] @ k[b, s, g])) for s in range(seen)])
        out[b, t, h] = sum(weight * v[b, s, g] for s, weight in enumerate(weights / weights.sum()))
    return out


def outputs_and_gradients(
    inputs: tuple[torch.Tensor, ...], causal: bool, backend: str, out_gradient: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves, causal=causal, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, out_gradient.to(out.dtype))]


@given(shapes)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_reference_is_the_definition(scale: float | None, shape: Shape) -> None:
    q, k, v = shape.inputs()
    expected = numpy_attention(
        q.numpy(), k.numpy(), v.numpy(), shape.causal, 1 / math.sqrt(shape.D) if scale is None else scale
    )
    found = attend(q, k, v, causal=shape.causal, scale=scale, backend="reference")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [Shape(2, 3, 3, 2, 2, 4, True), Shape(1, 2, 4, 1, 3, 2, True)], ids=str)
def test_reference_has_the_gradients_of_its_outputs(shape: Shape) -> None:
    inputs = tuple(x.requires_grad_() for x in shape.inputs())
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, causal=shape.causal, backend="reference"), inputs, fast_mode=True
    )


def test_reference_computes_in_float32_also_under_autocast() -> None:
    q, k, v = Shape(1, 8, 8, 2, 2, 16, True).inputs(torch.float32)
    expected = attend(q, k, v, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, backend="reference")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@given(shape=shapes)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@everywhere
def test_backend_agrees_with_the_reference(backend: str, dtype: torch.dtype, shape: Shape) -> None:
    inputs = shape.inputs(dtype)
    out_gradient = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = tuple(x.double() for x in inputs)
    expected = outputs_and_gradients(exact, shape.causal, "reference", out_gradient.to(dtype).double())
    found = outputs_and_gradients(inputs, shape.causal, backend, out_gradient)
    assert found[0].dtype == dtype and found[0].shape == inputs[0].shape
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        tolerance = TOLERANCES[dtype] * (1 if name == "out" else GRADIENT_FACTOR)
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@given(shape=shapes)
@everywhere
def test_grouped_heads_equal_repeated_ones(backend: str, shape: Shape) -> None:
    q, k, v = shape.inputs()
    grouped = attend(q, k, v, causal=shape.causal, backend=backend)
    repeated = (x.repeat_interleave(shape.R, dim=2) for x in (k, v))
    torch.testing.assert_close(grouped, attend(q, *repeated, causal=shape.causal, backend=backend))


@given(shape=shapes, data=st.data())
@everywhere
def test_a_later_token_never_changes_an_earlier_output(backend: str, shape: Shape, data: st.DataObject) -> None:
    shape = replace(shape, causal=True)
    q, k, v = shape.inputs()
    changed = data.draw(st.integers(0, shape.S - 1))
    before = attend(q, k, v, backend=backend)
    k[:, changed] += 3
    v[:, changed] -= 5
    after = attend(q, k, v, backend=backend)
    first = max(0, changed - (shape.S - shape.T))  # the first query that sees the key; the last one sees every key
    assert torch.equal(after[:, :first], before[:, :first])
    assert (after[:, first:] != before[:, first:]).any(dim=-1).all()


@everywhere
def test_fewer_queries_than_keys_are_the_last_ones(backend: str) -> None:
    q, k, v = Shape(2, 7, 7, 2, 3, 8, True).inputs()
    whole = attend(q, k, v, backend=backend)
    for T in range(1, 8):
        torch.testing.assert_close(attend(q[:, -T:], k, v, backend=backend), whole[:, -T:])


@everywhere
def test_views_of_one_projection_are_taken_as_they_are(backend: str) -> None:
    qkv = torch.randn(2, 5, 4 + 2 * 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.split([4, 2, 2], dim=2)
    assert not k.is_contiguous()
    copies = attend(q.contiguous(), k.contiguous(), v.contiguous(), backend="reference")
    torch.testing.assert_close(attend(q, k, v, backend=backend), copies)


@everywhere
def test_dropout_of_zero_changes_nothing(backend: str) -> None:
    q, k, v = Shape(2, 5, 5, 2, 2, 8, True).inputs(torch.float32)
    first, second = (attend(q, k, v, dropout=0.0, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@everywhere
def test_dropout_keeps_the_mean(backend: str) -> None:
    one = Shape(1, 4, 4, 1, 2, 3, True).inputs(torch.float32)
    q, k, v = (x.expand(20_000, *x.shape[1:]).contiguous() for x in one)
    torch.manual_seed(0)
    dropped = attend(q, k, v, dropout=0.25, backend=backend)
    assert not torch.equal(dropped[0], dropped[1])
    # A standard error of at most 0.01, the values being of order 1.
    torch.testing.assert_close(dropped.mean(0, keepdim=True), attend(*one, backend="reference"), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 3, 4, 8), (2, 3, 3, 8), (2, 3, 3, 8)),  # G does not divide H
        ((2, 3, 4, 8), (1, 3, 4, 8), (1, 3, 4, 8)),  # another batch
        ((2, 3, 4, 8), (2, 3, 4, 6), (2, 3, 4, 6)),  # another head dim
        ((2, 3, 4, 8), (2, 3, 4, 8), (2, 5, 4, 8)),  # keys without values
        ((3, 4, 8), (3, 4, 8), (3, 4, 8)),  # no batch
    ],
)
def test_shapes_that_do_not_fit_are_named(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        attend(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    for name, shape in (("q", q), ("k", k), ("v", v)):
        assert f"{name}{shape}" in str(error.value)


def test_causal_queries_without_a_key_are_refused() -> None:
    q, k, v = torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    with pytest.raises(ConfigError, match="q has 3 positions and k only 2"):
        attend(q, k, v)
    assert attend(q, k, v, causal=False).shape == q.shape


def test_whole_numbers_are_refused_with_every_reason() -> None:
    q = torch.zeros(1, 2, 1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError) as error:
        attend(q, q, q)
    assert all(f"{name}: " in str(error.value) for name in BACKENDS)


def test_auto_runs_the_backend_that_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    select.cache_clear()
    q, k, v = Shape(1, 2, 2, 1, 1, 4, True).inputs()
    taken = next(iter(BACKENDS))
    calls = []
    monkeypatch.setattr(BACKENDS[taken], "run", lambda q, k, v, *rest: calls.append(rest))
    attend(q, k, v, dropout=0.5)
    assert calls == [(AttentionSpec(q.dtype, 4, 1, 1, True, 0.5), 0.5)]
