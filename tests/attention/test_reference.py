"""The reference backend against the definition, and its gradients against finite differences of its outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddlehead.attention import AttentionSpec, attend
from fiddlehead.attention.backends import reference
from fiddlehead.attention.backends.backend import Extras
from fiddlehead.attention.backends.masks import seen, visible
from tests.attention.definition import Call, calls, one_sequence, windows

FEATURES = [
    Call(),
    Call(causal=False, T=6, S=4),
    Call(window_size=(2, 0), softcap=1.5),
    Call(causal=False, window_size=(0, 1), alibi=True),
    Call(sinks=True, padding=True, seed=3),
    Call(softcap=1.5, alibi=True, sinks=True, padding=True, window_size=(1, 0), R=3),
]


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return attend(q, k, v, sinks=sinks[0] if sinks else None, backend="reference", **arguments)


def spec_of(q: torch.Tensor, k: torch.Tensor, **rest: Any) -> AttentionSpec:
    H, G = q.shape[-2], k.shape[-2]
    return AttentionSpec(dtype=q.dtype, head_dim=q.shape[-1], num_attention_heads=H, num_query_groups=G, **rest)


@given(calls())
@settings(max_examples=200)
def test_the_reference_computes_the_definition(call: Call) -> None:
    out = run(*call.inputs(), **call.arguments())
    np.testing.assert_allclose(out.numpy(), call.defined(), rtol=1e-12, atol=1e-12)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    causal=st.booleans(),
    window_size=windows,
    alibi=st.booleans(),
)
def test_packed_sequences_are_by_themselves(
    lengths: list[tuple[int, int]], causal: bool, window_size: tuple[int, int], alibi: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    borders_q, borders_k = (np.cumsum([0, *column]).tolist() for column in zip(*lengths, strict=True))
    after = 2  # tokens behind the last sequence see nothing
    q = torch.randn(borders_q[-1] + after, 4, 3, generator=generator, dtype=torch.float64)
    k, v = (
        torch.randn(borders_k[-1] + after, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    slopes = torch.rand(4, generator=generator) if alibi else None
    out = attend(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        alibi_slopes=slopes,
        cu_seqlens_q=torch.tensor(borders_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(borders_k, dtype=torch.int32),
        max_seqlen_q=6,
        max_seqlen_k=6,
        backend="reference",
    )
    expected = np.zeros(q.shape)
    for n in range(len(lengths)):
        in_q, in_k = slice(*borders_q[n : n + 2]), slice(*borders_k[n : n + 2])
        expected[in_q] = one_sequence(
            q[in_q].numpy(),
            k[in_k].detach().numpy(),
            v[in_k].detach().numpy(),
            causal=causal,
            window_size=window_size,
            alibi_slopes=None if slopes is None else slopes.double().numpy(),
        )
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(out.sum(), [k, v]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("page_size", [0, 3])
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    T=st.integers(1, 4),
    causal=st.booleans(),
    window_size=windows,
    alibi=st.booleans(),
)
def test_a_cache_is_read_as_far_as_it_is_filled(
    page_size: int, lengths: list[int], T: int, causal: bool, window_size: tuple[int, int], alibi: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    B = len(lengths)
    q = torch.randn(B, T, 4, 3, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(B, 9, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    slopes = torch.rand(4, generator=generator) if alibi else None
    extras = Extras(cache_lengths=torch.tensor(lengths, dtype=torch.int32), alibi_slopes=slopes)
    given_k, given_v = k, v
    if page_size:  # the same numbers, cut into pages that lie in another order
        order = torch.randperm(B * 3, generator=generator)
        pages = torch.empty_like(order)
        pages[order] = torch.arange(B * 3)
        extras = extras._replace(page_table=pages.view(B, 3).int())
        given_k, given_v = (x.reshape(B * 3, 3, 2, 3)[order] for x in (k, v))
    spec = spec_of(
        q, k, causal=causal, window_size=window_size, alibi=alibi, cached=True, page_size=page_size, same_length=False
    )
    out = reference.run(q, given_k, given_v, spec, 0.7, extras)
    for b, length in enumerate(lengths):
        expected = one_sequence(
            q[b].numpy(),
            k[b, :length].numpy(),
            v[b, :length].numpy(),
            causal=causal,
            window_size=window_size,
            alibi_slopes=None if slopes is None else slopes.double().numpy(),
            scale=0.7,
        )
        np.testing.assert_allclose(out[b].numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("call", FEATURES, ids=str)
def test_its_gradients_are_those_of_its_outputs(call: Call) -> None:
    call = replace(call, B=1, D=3)
    inputs = [x.requires_grad_() for x in call.inputs()]
    arguments = call.arguments()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):  # no NaN on the way either
        assert torch.autograd.gradcheck(lambda *x: run(*x, **arguments), inputs, fast_mode=True)


def test_its_gradients_with_packed_sequences_are_those_of_its_outputs() -> None:
    borders = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    q, k, v = (torch.randn(7, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    packed = {"cu_seqlens_q": borders, "max_seqlen_q": 4}
    assert torch.autograd.gradcheck(lambda *x: run(*x, **packed), (q, k, v), fast_mode=True)


def test_dropout_has_the_gradients_of_the_weights_it_left() -> None:
    inputs = [x.requires_grad_() for x in Call(B=1, D=3).inputs()]

    def dropped(*x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return run(*x, dropout=0.5)

    assert torch.autograd.gradcheck(dropped, inputs, fast_mode=True)


def test_dropout_keeps_the_mean() -> None:
    one = Call(B=1, T=4, S=4, D=3).inputs(torch.float32)
    torch.manual_seed(0)
    dropped = run(*(x.expand(20_000, *x.shape[1:]) for x in one), dropout=0.25)
    assert not torch.equal(dropped[0], dropped[1])
    # A standard error of at most 0.01, the values being of order 1.
    torch.testing.assert_close(dropped.mean(0, keepdim=True), run(*one), atol=0.05, rtol=0)


def test_it_computes_in_float32_also_under_autocast() -> None:
    inputs = Call().inputs(torch.float32)
    expected = run(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@given(calls(padding=True))
def test_queries_that_see_no_key_are_found_without_the_mask(call: Call) -> None:
    q, k, *_ = call.inputs()
    spec = spec_of(q, k, causal=call.causal, window_size=call.window_size, padding_mask=True)
    extras = Extras(padding_mask=call.arguments()["padding_mask"])
    mask = visible(call.T, call.S, spec, extras, q.device)
    assert mask is not None
    assert torch.equal(seen(call.T, call.S, spec, extras), mask.any(dim=-1))


OPERATOR_CALLS = [{}, {"causal": False, "left": 1, "softcap": 1.5}, {"padding_mask": "left", "sinks": True}]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own, when it looks at what `opcheck` gives it
@pytest.mark.parametrize("features", OPERATOR_CALLS, ids=str)
def test_the_operator_is_well_formed(features: dict[str, Any]) -> None:
    q, k, v, sinks = Call(B=2, T=3, S=3, sinks=True).inputs(torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    padding = torch.tensor([[False, True, True], [True] * 3]) if "padding_mask" in features else None
    tensors = (None, None, padding, None, sinks.requires_grad_() if "sinks" in features else None, None)
    left, softcap = features.get("left", -1), features.get("softcap", 0.0)
    numbers = (features.get("causal", True), left, -1, softcap, 0.0, 0.5)
    torch.library.opcheck(reference.forward, (*inputs, *tensors, *numbers))
