"""FlexAttention: its rules, its masks and blocks; it always runs compiled."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention as torch_flex

from fiddlehead.attention import AttentionSpec, Packages, Target, attend
from fiddlehead.attention.backends import flex
from fiddlehead.attention.backends.backend import Extras
from fiddlehead.attention.backends.masks import visible
from tests.attention.definition import Call, calls
from tests.attention.graphs import Graphs

# Importing inductor uses what PyTorch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="FlexAttention's CPU kernel needs g++ and AVX2",
)

BASE: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "training": False,
}
PACKAGES = Packages(torch="2.11.0", cudnn=None)
CPU = Target("cpu", "cpu", packages=PACKAGES)


def gpu(sm: int) -> Target:
    return Target("cuda", f"sm{sm}", divmod(sm, 10), PACKAGES)


RULES: list[tuple[dict[str, Any], Target, str | None]] = [
    ({"training": True, "packed": True, "softcap": 30.0, "deterministic": True}, gpu(90), None),
    ({"training": True, "head_dim": 100, "dtype": torch.float32, "alibi": True}, gpu(80), None),
    ({"cached": True, "window_size": (5, 0)}, gpu(120), None),
    ({}, gpu(75), "sm75: Triton is made for sm80 and later"),
    ({"head_dim": 8}, gpu(90), "head_dim=8: at least 16"),
    ({"dtype": torch.float64}, gpu(90), "float64: only float16, bfloat16 and float32"),
    ({"dropout": 0.1}, gpu(90), "dropout"),
    ({"cached": True, "page_size": 256}, gpu(90), "paged cache"),
    ({}, Target("mps", "mps", packages=PACKAGES), "not mps"),
    ({"dtype": torch.float64}, CPU, "float64"),
    ({"training": True}, CPU, "training: its CPU kernel has no gradients"),
    ({"sinks": True}, CPU, "sinks"),
    ({"dropout": 0.1}, CPU, "dropout"),
    ({"cached": True, "page_size": 256}, CPU, "paged cache"),
]


@pytest.mark.parametrize(("changed", "where", "reason"), RULES, ids=lambda x: getattr(x, "name", str(x)))
def test_each_rule(changed: dict[str, Any], where: Target, reason: str | None) -> None:
    found = flex.why_not(AttentionSpec(**BASE | changed), where)
    assert found == reason if reason is None else reason in (found or "")


def test_missing_features_of_this_machine_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(**BASE)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert "no-such-compiler is not on the PATH" in (flex.why_not(spec, CPU) or "")
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert "needs AVX2" in (flex.why_not(spec, CPU) or "")
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(flex.importlib.util, "find_spec", lambda name: None)
        assert flex.why_not(spec, gpu(90)) == "triton is not installed"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "TORCHDYNAMO_DISABLE" in (flex.why_not(spec, gpu(90)) or "")


def extras_of(call: Call, sinks: torch.Tensor | None = None) -> Extras:
    arguments = call.arguments()
    return Extras(padding_mask=arguments["padding_mask"], alibi_slopes=arguments["alibi_slopes"], sinks=sinks)


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, **features: Any) -> torch.Tensor:
    """The backend, past its rules."""
    scale = features.pop("scale", None) or q.shape[-1] ** -0.5
    spec = AttentionSpec(
        **{
            "dtype": q.dtype,
            "head_dim": q.shape[-1],
            "num_attention_heads": q.shape[-2],
            "num_query_groups": k.shape[-2],
            "alibi": extras.alibi_slopes is not None,
            "sinks": extras.sinks is not None,
            "padding_mask": extras.padding_mask is not None,
            "packed": extras.cu_seqlens_q is not None,
            "cached": extras.cache_lengths is not None,
        }
        | features
    )
    return flex.run(q, k, v, spec, scale, extras)


def features_of(call: Call) -> dict[str, Any]:
    return {"causal": call.causal, "window_size": call.window_size, "softcap": call.softcap, "scale": call.scale}


@contextmanager
def written_out() -> Iterator[None]:
    """FlexAttention's masks and scores as PyTorch computes them without a kernel, in any dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


@settings(max_examples=40)
@given(call=calls())
def test_masks_and_scores_are_as_defined(call: Call) -> None:
    q, k, v, *sinks = call.inputs()
    with written_out(), torch.no_grad():
        found = run(q, k, v, extras_of(call, *sinks), **features_of(call))
    torch.testing.assert_close(found, torch.from_numpy(call.defined()), rtol=1e-6, atol=1e-6)


def packed(lengths_q: list[int], lengths_k: list[int], more: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Inputs of sequences of these lengths, `more` tokens that belong to none, and the arguments of `attend`."""
    generator = torch.Generator().manual_seed(sum(lengths_q))
    shapes = [(sum(lengths_q) + more, 4, 16), *[(sum(lengths_k) + more, 2, 16)] * 2]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    borders = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return inputs, {
        "cu_seqlens_q": borders[0],
        "cu_seqlens_k": borders[1],
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
    }


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=30)
@given(lengths, st.booleans(), st.sampled_from([(-1, -1), (2, 0), (1, 2)]), st.booleans(), st.integers(0, 2))
def test_packed_sequences_are_kept_apart(
    lengths: list[tuple[int, int]], causal: bool, window: tuple[int, int], alibi: bool, more: int
) -> None:
    inputs, arguments = packed([q for q, _ in lengths], [q + other for q, other in lengths], more)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0]) if alibi else None
    q, k, v = inputs
    with written_out(), torch.no_grad():
        found = run(q, k, v, Extras(**arguments, alibi_slopes=slopes), causal=causal, window_size=window)
    asked: dict[str, Any] = {"causal": causal, "window_size": window, "alibi_slopes": slopes}
    torch.testing.assert_close(found, attend(*inputs, **arguments, **asked, backend="reference"), rtol=1e-6, atol=1e-6)


@given(
    T=st.integers(1, 14),
    more=st.integers(-3, 9),
    causal=st.booleans(),
    window=st.sampled_from([(-1, -1), (3, 0), (5, 5), (-1, 2)]),
    kind=st.sampled_from(["", "padded", "packed", "cached"]),
    seed=st.integers(0, 99),
)
def test_blocks_leave_out_no_key_that_is_seen(
    T: int, more: int, causal: bool, window: tuple[int, int], kind: str, seed: int
) -> None:
    S = max(1, T + more)
    generator = torch.Generator().manual_seed(seed)
    extras = Extras()
    if kind == "padded":
        extras = Extras(padding_mask=torch.rand(2, S, generator=generator) < 0.5)
    elif kind == "packed":
        cut = seed % min(T, S)
        extras = Extras(torch.tensor([0, cut, T]).int(), torch.tensor([0, cut, S]).int())
    elif kind == "cached":
        extras = Extras(cache_lengths=torch.tensor([S, max(1, S // 2)]).int())
    spec = AttentionSpec(
        **BASE,
        causal=causal,
        window_size=window,
        padding_mask=kind == "padded",
        packed=kind == "packed",
        cached=kind == "cached",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 4)
        blocks = flex._sight(T, S, spec, extras, torch.device("cpu")).blocks
    sees = visible(T, S, spec, extras, torch.device("cpu"))
    sees = torch.ones(1, T, S, dtype=torch.bool) if sees is None else sees
    Q, K = -(-T // 4), -(-S // 4)
    grid = torch.zeros(len(sees), Q * 4, K * 4, dtype=torch.bool)
    grid[:, :T, :S] = sees
    grid = grid.unflatten(2, (K, 4)).unflatten(1, (Q, 4)).permute(0, 1, 3, 2, 4).flatten(3)
    part, whole, part_k, whole_k = (listed(*blocks[i : i + 2]).expand(len(sees), -1, -1) for i in (0, 2, 4, 6))
    assert torch.equal(part.mT, part_k) and torch.equal(whole.mT, whole_k)
    assert not (part & whole).any()
    assert not (grid.any(-1) & ~(part | whole)).any()
    assert torch.equal(whole, grid.all(-1))
    if kind in ("", "cached"):  # of the others a block may be taken that shows nothing
        assert not ((part | whole).sum() > 3 * grid.any(-1).sum() + 3)


def listed(count: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The blocks that a `BlockMask` lists, (B, rows, columns)."""
    first = torch.arange(order.shape[-1]) < count[..., None]
    return torch.zeros_like(first).scatter(-1, order.long(), first)[:, 0]


GRADIENTS = [
    Call(B=2, T=5, S=9, window_size=(3, 0), softcap=1.5, alibi=True),
    Call(B=3, T=6, S=6, sinks=True, padding=True, seed=3),
    Call(B=2, T=6, S=3, causal=False, window_size=(1, 1), sinks=True),
]


@pytest.fixture
def with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has gradients on CPUs for the graph's node, though not for the kernel, and therefore refuses."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


@pytest.mark.parametrize("call", GRADIENTS, ids=str)
def test_gradients_are_the_references_and_each_pass_is_one_node(with_gradients: None, call: Call) -> None:
    inputs = [x.requires_grad_() for x in call.inputs()]
    extras = extras_of(call)
    graphs = Graphs()

    def call_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: torch.Tensor) -> torch.Tensor:
        return run(q, k, v, extras._replace(sinks=sinks[0] if sinks else None), **features_of(call))

    compiled = torch.compile(call_flex, fullgraph=True, backend=graphs.backend)
    sinks = inputs[3] if call.sinks else None
    expected = attend(*inputs[:3], **call.arguments(), sinks=sinks, backend="reference")
    out = compiled(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(out)
    found, right = (torch.autograd.grad((x * direction).sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    names = [[name for name in graph if "flex_attention" in name] for graph in graphs.names]
    assert names == [["flex_attention"], ["flex_attention_backward"]]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Neither before nor after: what a test compiles in its own way is not the next one's."""
    forget()
    yield
    forget()


def forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flex._compiled.cache_clear()


@needs_compiler
def test_many_shapes_stay_compiled_and_right(nothing_compiled: None) -> None:
    shapes = [(2 + T % 2, T, T + 1 + 37 * T % 90) for T in range(135, 155)]
    for B, T, S in shapes:
        call = Call(B=B, T=T, S=S, D=16, window_size=(60, 0), seed=T)
        q, k, v = call.inputs(torch.float32)
        found = attend(q, k, v, **call.arguments(), backend="flex")
        close(found, attend(*call.inputs(), **call.arguments(), backend="reference"))
    # One for the first shape, and one for all the others.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_kernel_agrees_on_everything_it_claims(dtype: torch.dtype) -> None:
    """One compiled call with every feature that has no arguments of its own, and blind queries in whole blocks."""
    call = Call(B=2, T=200, S=140, D=32, causal=False, window_size=(9, 3), softcap=2.0, alibi=True, padding=True)
    q, k, v = (x.requires_grad_() for x in call.inputs(dtype))
    arguments = call.arguments()
    arguments["padding_mask"][1, :130] = False
    with torch.no_grad():
        found = attend(q, k, v, **arguments, backend="flex")
        right = attend(q.double(), k.double(), v.double(), **arguments, backend="reference")
    assert (right == 0).all(dim=-1).any()
    assert not found[(right == 0).all(dim=-1)].any()
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_the_cpus_kernel_agrees_on_packed_sequences() -> None:
    inputs, arguments = packed([150, 3, 60], [170, 3, 100], dtype=torch.float32)
    right = attend(*[x.double() for x in inputs], **arguments, window_size=(40, 0), backend="reference")
    close(attend(*inputs, **arguments, window_size=(40, 0), backend="flex"), right)


@needs_compiler
def test_the_cpus_kernel_agrees_on_a_cache() -> None:
    q, k, v = Call(B=2, T=3, S=150, D=16).inputs(torch.float32)
    filled = Extras(cache_lengths=torch.tensor([150, 7], dtype=torch.int32))
    with torch.no_grad():
        found = run(q, k, v, filled, causal=True, training=False)
    for b, length in enumerate((150, 7)):
        right = attend(*[x[b : b + 1].double() for x in (q, k[:, :length], v[:, :length])], backend="reference")
        close(found[b : b + 1], right)


def test_without_the_compiler_it_raises_instead_of_running_eagerly(nothing_compiled: None) -> None:
    q, k, v = Call().inputs(torch.float32)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="is switched off"):
        run(q, k, v, Extras(), training=False)


def test_more_than_the_recompile_limit_raises(nothing_compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **asked: real(function, **asked, backend="aot_eager"))
    first, second = (tuple(Call(T=T, S=T).inputs(torch.float32)[:3]) for T in (5, 7))
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        attend(*first, backend="flex")
        with pytest.raises(FailOnRecompileLimitHit, match="fullgraph=True"):
            attend(*second, backend="flex")


def test_block_masks_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = flex._sight
    monkeypatch.setattr(flex, "_sight", lambda *args: made.append(1) or real(*args))
    flex._sight_of_lengths.cache_clear()
    cpu = torch.device("cpu")
    spec, packs = AttentionSpec(**BASE), AttentionSpec(**BASE, packed=True)
    assert flex._kept_sight(9, 9, spec, Extras(), cpu) is flex._kept_sight(9, 9, spec, Extras(), cpu)
    assert len(made) == 1
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    extras = Extras(borders, borders, 5, 5)
    first = flex._kept_sight(9, 9, packs, extras, cpu)
    assert flex._kept_sight(9, 9, packs, extras, cpu) is first and len(made) == 2
    borders[1] = 2  # the next batch, in the same memory
    assert not torch.equal(flex._kept_sight(9, 9, packs, extras, cpu).begin, first.begin) and len(made) == 3
    other = torch.tensor([0, 3, 9], dtype=torch.int32)
    assert not torch.equal(flex._kept_sight(9, 9, packs, Extras(borders, other), cpu).begin, first.begin)
    gc.collect()
    kept = len(flex._sights)
    del borders, extras
    gc.collect()
    assert len(flex._sights) == kept - 1
