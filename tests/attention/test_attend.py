"""The results of `attend` with every backend, and the calls that it refuses.

FlexAttention has its own tests, because it is compiled for each shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.attention import BACKENDS, attend
from fiddlehead.errors import ConfigError
from tests.attention.definition import Call, calls, windows
from tests.attention.graphs import Graphs

TOLERANCES = {
    # Largest error beside the float64 reference of the same (rounded) inputs, outputs being of order 1.
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
GRADIENT_FACTOR = 8
"""Gradients sum over more terms than outputs, and their own size is up to a few times larger."""

everywhere = pytest.mark.parametrize("backend", ["sdpa_flash", "reference"])


def served(backend: str) -> st.SearchStrategy[Call]:
    """Calls that the backend serves on a CPU."""
    return calls() if backend == "reference" else calls(softcap=0.0, sinks=False)


def outputs_and_gradients(
    inputs: list[torch.Tensor], out_gradient: torch.Tensor, run: Callable[..., torch.Tensor] = attend, **arguments: Any
) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves[:3], **arguments, **({"sinks": leaves[3]} if len(leaves) > 3 else {}))
    return [out, *torch.autograd.grad(out, leaves, out_gradient.to(out.dtype))]


def assert_agree(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=False):
        tolerance = TOLERANCES[dtype] * (1 if name == "out" else GRADIENT_FACTOR)
        torch.testing.assert_close(
            x.double(), y.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@everywhere
@given(data=st.data())
def test_it_agrees_with_the_float64_reference(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    call = data.draw(served(backend))
    inputs, arguments = call.inputs(dtype), call.arguments()
    out_gradient = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = [x.double() for x in inputs]
    expected = outputs_and_gradients(exact, out_gradient, **arguments, backend="reference")
    found = outputs_and_gradients(inputs, out_gradient, **arguments, backend=backend)
    assert found[0].dtype == dtype and found[0].shape == inputs[0].shape
    assert_agree(found, expected, dtype)


@everywhere
def test_a_query_that_sees_no_key_yields_zeros_and_zero_gradients(backend: str) -> None:
    q, k, v = Call(B=2, T=5, S=5).inputs(torch.float32)
    mask = torch.tensor([[False, False, True, True, True], [False] * 5])  # padded on the left, and altogether
    found = outputs_and_gradients([q, k, v], torch.ones_like(q), padding_mask=mask, backend=backend)
    for x in found[:2]:  # the output, and the gradient of q
        assert not x[0, :2].any() and not x[1].any()
    assert found[0][0, 2:].all()
    for x in found[2:]:
        assert not x[0, :2].any() and not x[1].any()
        assert x.isfinite().all()


@everywhere
@given(data=st.data())
def test_grouped_heads_equal_repeated_ones(backend: str, data: st.DataObject) -> None:
    call = data.draw(served(backend))
    q, k, v, *sinks = call.inputs()
    arguments = {**call.arguments(), "sinks": sinks[0] if sinks else None, "backend": backend}
    repeated = (x.repeat_interleave(call.R, dim=2) for x in (k, v))
    torch.testing.assert_close(attend(q, k, v, **arguments), attend(q, *repeated, **arguments))


@everywhere
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    causal=st.booleans(),
    window_size=windows,
    alibi=st.booleans(),
)
def test_packed_sequences_equal_separate_ones(
    backend: str, lengths: list[int], causal: bool, window_size: tuple[int, int], alibi: bool
) -> None:
    q, k, v = (x[0] for x in Call(B=1, T=sum(lengths), S=sum(lengths)).inputs())
    arguments = {
        "causal": causal,
        "window_size": window_size,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]) if alibi else None,
        "backend": backend,
    }
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    packed = outputs_and_gradients([q, k, v], gradient, cu_seqlens_q=borders, max_seqlen_q=max(lengths), **arguments)
    parts = zip(*(x.split(lengths) for x in (q, k, v, gradient)), strict=True)
    separate = [outputs_and_gradients([x[None] for x in qkv], part[None], **arguments) for *qkv, part in parts]
    for x, pieces in zip(packed, zip(*separate, strict=True), strict=True):
        torch.testing.assert_close(x, torch.cat([piece[0] for piece in pieces]))


@everywhere
@given(data=st.data())
def test_a_later_token_never_changes_an_earlier_output(backend: str, data: st.DataObject) -> None:
    fixed = {"causal": True, "padding": False, "window_size": (-1, -1)}
    call = data.draw(calls(**fixed) if backend == "reference" else calls(**fixed, softcap=0.0, sinks=False))
    q, k, v, *sinks = call.inputs()
    arguments = {**call.arguments(), "sinks": sinks[0] if sinks else None, "backend": backend}
    changed = data.draw(st.integers(0, call.S - 1))
    before = attend(q, k, v, **arguments)
    k[:, changed] += 3
    v[:, changed] -= 5
    after = attend(q, k, v, **arguments)
    first = max(0, changed - (call.S - call.T))  # the first query that sees the key; the last one sees every key
    assert torch.equal(after[:, :first], before[:, :first])
    assert (after[:, first:] != before[:, first:]).any(dim=-1).all()


@everywhere
def test_fewer_queries_than_keys_are_the_last_ones(backend: str) -> None:
    q, k, v = Call(T=7, S=7).inputs()
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


FORWARD = {
    "sdpa_flash": "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "reference": "fiddlehead.reference_forward.default",
}
COMPILED = [
    Call(T=6, S=6),
    Call(causal=False, alibi=True),
    Call(window_size=(2, 0), padding=True),
    Call(softcap=1.5, sinks=True, alibi=True, padding=True),
]


@pytest.mark.parametrize(
    ("backend", "call"),
    [("reference", call) for call in COMPILED] + [("sdpa_flash", call) for call in COMPILED if not call.softcap],
    ids=str,
)
def test_compiled_each_pass_is_one_node_and_computes_the_same(backend: str, call: Call) -> None:
    graphs = Graphs()
    compiled = torch.compile(attend, fullgraph=True, backend=graphs.backend, dynamic=False)
    inputs, arguments = call.inputs(), {**call.arguments(), "backend": backend}
    gradient = torch.ones_like(inputs[0])
    found = outputs_and_gradients(inputs, gradient, run=compiled, **arguments)
    assert_agree(found, outputs_and_gradients(inputs, gradient, **arguments), torch.float64)
    forward, backward = graphs.attention()
    assert forward == [FORWARD[backend]]
    assert len(backward) == 1 and "backward" in backward[0]


@everywhere
def test_compiled_packed_sequences_are_one_node_too(backend: str) -> None:
    graphs = Graphs()
    compiled = torch.compile(attend, fullgraph=True, backend=graphs.backend, dynamic=False)
    inputs = [x[0] for x in Call(B=1, T=7, S=7).inputs()]
    packed = {
        "cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
        "max_seqlen_q": 4,
        "backend": backend,
    }
    gradient = torch.ones_like(inputs[0])
    found = outputs_and_gradients(inputs, gradient, run=compiled, **packed)
    assert_agree(found, outputs_and_gradients(inputs, gradient, **packed), torch.float64)
    assert [len(names) for names in graphs.attention()] == [1, 1]


def test_compiled_dropout_has_the_gradients_of_the_weights_it_left() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=False)
    q, k, v = (x.requires_grad_() for x in Call(T=6, S=6).inputs())
    out = compiled(q, k, v, dropout=0.5, backend="reference")
    assert not torch.equal(out, compiled(q, k, v, dropout=0.5, backend="reference"))
    # The output is linear in v: were other weights dropped on the way back, this sum would not be the same.
    (dv,) = torch.autograd.grad(out, v, out.detach())
    torch.testing.assert_close((dv * v).sum(), (out * out).sum())


@everywhere
def test_compiled_lengths_become_symbolic_instead_of_a_graph_each(backend: str) -> None:
    graphs = Graphs()
    compiled = torch.compile(attend, fullgraph=True, backend=graphs.backend)
    for T in (5, 6, 9, 12):
        q, k, v = Call(T=T, S=T).inputs()
        torch.testing.assert_close(compiled(q, k, v, backend=backend), attend(q, k, v, backend="reference"))
    assert len(graphs.names) == 2  # the first length as it was, and one for all others


q4, k4 = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8)
q3, k3 = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
borders = torch.tensor([0, 2, 6], dtype=torch.int32)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("G dividing H", {"k": torch.zeros(2, 3, 3, 8), "v": torch.zeros(2, 3, 3, 8)}),
    (r"k\(1, 3, 2, 8\)", {"k": k4[:1], "v": k4[:1]}),
    ("do not fit", {"k": k4[..., :6], "v": k4[..., :6]}),
    (r"v\(2, 5, 2, 8\)", {"v": torch.zeros(2, 5, 2, 8)}),
    ("do not fit", {"q": q3, "k": k3, "v": k3}),
    ("q is torch.float32, k torch.bfloat16", {"k": k4.bfloat16(), "v": k4.bfloat16()}),
    ("q has 3 positions and k only 2", {"k": k4[:, :2], "v": k4[:, :2]}),
    (r"window_size=\(-2, 0\)", {"window_size": (-2, 0)}),
    ("softcap=-1", {"softcap": -1.0}),
    (r"dropout=1\.0", {"dropout": 1.0}),
    ("max_seqlen_q=None", {"q": q3, "k": k3, "v": k3, "cu_seqlens_q": borders}),
    (r"expected \(tokens, H, D\)", {"cu_seqlens_q": borders, "max_seqlen_q": 4}),
    ("unknown backend 'flash5'", {"backend": "flash5"}),
    ("cudnn: needs an NVIDIA GPU", {"backend": "cudnn"}),
    ("sdpa_flash: softcap", {"softcap": 2.0, "backend": "sdpa_flash"}),
    ("sdpa_flash: dropout", {"dropout": 0.5, "backend": "sdpa_flash"}),
]


@pytest.mark.parametrize(("message", "changed"), REFUSED, ids=[message for message, _ in REFUSED])
def test_what_does_not_fit_is_refused_with_the_reason(message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        attend(**{"q": q4, "k": k4, "v": k4, **changed})


def test_whole_numbers_are_refused_with_every_reason() -> None:
    q = torch.zeros(1, 2, 1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError) as error:
        attend(q, q, q)
    assert all(f"{name}: " in str(error.value) for name in BACKENDS)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa_flash", "flex"])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(0, 0, True), (0, 0, False), (0, 4, True), (0, 4, False), (4, 0, False)]
)
def test_no_queries_or_no_keys_give_zeros(backend: str, queries: int, keys: int, causal: bool) -> None:
    """PyTorch's kernels divide by their number; the process ended with a floating point exception."""
    q = torch.randn(2, queries, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, keys, 2, 8, requires_grad=True) for _ in range(2))
    out = attend(q, k, v, causal=causal, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


def test_packed_sequences_may_have_no_tokens() -> None:
    q, k = torch.randn(0, 4, 8), torch.randn(0, 2, 8)
    borders = torch.zeros(1, dtype=torch.int32)
    assert attend(q, k, k, cu_seqlens_q=borders, max_seqlen_q=0).shape == (0, 4, 8)
