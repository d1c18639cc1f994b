"""Attention for some heads at a time has the outputs and gradients of that of all heads, and a tile's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fiddlehead.attention import KVCache
from fiddlehead.attention.backends import BACKENDS
from fiddlehead.attention.backends.backend import Passes
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, TransformerConfig, head_tiles
from fiddlehead.models.block import Attention
from fiddlehead.models.computation import Computation
from fiddlehead.models.places import Documents
from fiddlehead.models.speed import compile_transformer, recompute_activations, tile_attention, tile_mlp
from fiddlehead.training import LanguageModel
from fiddlehead.training.distributed.sizes import Sizes
from tests.allocated import Allocated
from tests.models.test_tiles import SMALL, error, learned, made, slope_is_right

NO_ROPE: dict[str, Any] = {"position_embedding_type": "none"}
"""Without rotary tables, which are float32."""
ODD: dict[str, Any] = {
    "num_attention_heads": 15,
    "num_query_groups": 3,
    "kv_channels": 40,
    "add_qkv_bias": True,
    "qk_layernorm": "head",
    **NO_ROPE,
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "five query heads each": (1, ODD),
    "two of six": (2, ODD | {"num_attention_heads": 12, "num_query_groups": 6, "kv_channels": 5}),
    "all at once": (3, ODD),
    "multi-query": (1, {"num_query_groups": 1}),
    "multi-head": (
        2,
        {"num_query_groups": None, "add_bias_linear": True, "position_embedding_type": "learned_absolute"},
    ),
    "a window": (1, {"window_size": (4, 0), "window_attn_skip_freq": 2, "rotary_percent": 0.5}),
    "capped": (1, {"attn_logit_softcapping": 0.7, "softmax_scale": 0.9, "norm_placement": "both"}),
}


def shape(*changes: dict[str, Any]) -> TransformerConfig:
    """A small model's, changed."""
    fields = dict(SMALL)
    for each in changes:
        fields |= each
    return TransformerConfig(**fields)


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are projected in several parts, of which the last is smaller."""
    monkeypatch.setattr(head_tiles, "TOKENS", 14)


@pytest.fixture
def compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def in_tiles(groups: int, recompute: Any = None, tokens: int | None = None, **changes: Any) -> Transformer:
    """The model that `made` makes, with attention for so many key/value heads at a time."""
    model = made(tokens, **changes)
    tile_attention(model, groups)
    if recompute is not None:
        recompute_activations(model, recompute)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_tiles_learns_the_same(case: str) -> None:
    groups, changes = CASES[case]
    plain, tiled = made(**changes).double(), in_tiles(groups, **changes).double()
    assert list(tiled.state_dict()) == list(plain.state_dict())
    found, expected = learned(tiled), learned(plain)
    assert max(error(found, expected).values()) < 1e-12
    assert all(torch.equal(again, found[name]) for name, again in _learned_anew(tiled).items())


def _learned_anew(model: Transformer) -> dict[str, torch.Tensor]:
    model.zero_grad()
    return learned(model)


@pytest.mark.parametrize("frozen", ["q_layernorm.weight", "linear_qkv", "linear_proj.weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    found, expected = in_tiles(1, "full", **ODD).double(), made(**ODD).double()
    for model in (found, expected):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
    assert max(error(learned(found), learned(expected)).values()) < 1e-12


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_and_rotation_of_heads_are_differentiated(zero_centered: bool) -> None:
    """In both passes these are partly in float32, whose rounding may differ."""
    changes = ODD | {"position_embedding_type": "rope", "layernorm_zero_centered_gamma": zero_centered}
    found, expected = learned(in_tiles(1, **changes).double()), learned(made(**changes).double())
    assert max(error(found, expected).values()) < 1e-6


@pytest.mark.parametrize("tokens", [None, 5])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_recomputed_model_with_tiles_learns_the_same(recompute: str, tokens: int | None) -> None:
    found, expected = learned(in_tiles(1, recompute, tokens, **ODD).double()), learned(made(**ODD).double())
    assert max(error(found, expected).values()) < 1e-12


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_documents_are_kept_apart(window: tuple[int, int] | None) -> None:
    """Empty documents, one over the border of two rows, and tokens behind the last one."""
    plain, tiled = (Attention(shape(ODD, {"window_size": window}), 0).double() for _ in range(2))
    tiled.load_state_dict(plain.state_dict())
    tiled.tiled = 1
    cu_seqlens = torch.tensor([0, 0, 3, 4, 4, 21, 30], dtype=torch.int32)
    results = []
    for module in (plain, tiled):
        torch.manual_seed(1)
        x = torch.randn(2, 17, 32, dtype=torch.float64, requires_grad=True)
        out = module(x, None, Documents(cu_seqlens, 17))
        gradients = torch.autograd.grad(out, [x, *module.parameters()], torch.randn_like(out))
        results.append((out.detach(), *gradients))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_the_gradient_is_the_slope_of_the_loss(recompute: str | None) -> None:
    assert slope_is_right(in_tiles(1, recompute, **ODD | {"window_size": (6, 0), "hidden_dropout": 0.2}).double())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_in_bfloat16_the_errors_are_those_without_tiles(rows: int, autocast: bool) -> None:
    """Nothing is rounded between two tiles; with the same kernel only its output, which both passes read, is."""
    heads = {"num_attention_heads": 32, "num_query_groups": 16, "kv_channels": 8, "hidden_size": 128}
    others = {"add_bias_linear": True, "position_embedding_type": "rope", "attention_backend": "reference"}
    config = shape(ODD, heads, others)
    torch.manual_seed(0)
    weights = Attention(config, 0).bfloat16().state_dict()
    x, dy = (torch.randn(rows, 200, 128).bfloat16() for _ in range(2))
    rope = config.rotary(0).tables(torch.arange(200), 200)

    def results(groups: int | None, dtype: torch.dtype, autocast: bool = False) -> dict[str, torch.Tensor]:
        attention = Attention(config, 0).to(dtype)
        attention.load_state_dict(weights)
        attention.tiled = groups
        given = x.to(torch.float64 if dtype == torch.float64 else torch.bfloat16, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention(given, rope, None)
        out.backward(dy.to(out.dtype))
        named = {"out": out.detach(), "x": given.grad, **{n: p.grad for n, p in attention.named_parameters()}}
        return {name: tensor.double() for name, tensor in named.items() if tensor is not None}

    exact = results(None, torch.float64)
    plain, tiled = (
        error(results(groups, torch.float32 if autocast else torch.bfloat16, autocast), exact) for groups in (None, 1)
    )
    for name in exact:  # the norms have few weights, of which each is a sum that nearly vanishes
        assert tiled[name] <= 1.05 * plain[name] + (5e-3 if "layernorm" in name else 1e-4), name
    assert min(plain.values()) > 1e-3


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes of attention, as they are called from now on."""
    calls: list[str] = []
    right = BACKENDS["reference"].PASSES  # type: ignore[attr-defined]

    def forward(*call: Any) -> Any:
        calls.append("forward")
        return right.forward(*call)

    def backward(*call: Any) -> Any:
        calls.append("backward")
        return right.backward(*call)

    monkeypatch.setattr(BACKENDS["reference"], "PASSES", Passes(forward, backward))
    return calls


@pytest.mark.parametrize("tokens", [None, 5])
@pytest.mark.parametrize(("recompute", "times"), [(None, 1), ("selective", 1), ("full", 2)])
def test_attention_is_computed_once_and_once_more_with_full(
    recompute: str | None, times: int, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    learned(in_tiles(1, recompute, tokens, **ODD))
    assert (calls.count("forward"), calls.count("backward")) == (times * 2 * 3, 2 * 3)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.parametrize(
    ("mode", "recompute", "tokens"),
    [
        ("layers", "full", 10),
        pytest.param("layers", None, None, marks=pytest.mark.long),
        pytest.param("layers", "selective", None, marks=pytest.mark.long),
        pytest.param("layers", "full", None, marks=pytest.mark.long),
        pytest.param("model", "full", None, marks=pytest.mark.long),
    ],
)
def test_a_compiled_model_with_tiles_learns_the_same(
    mode: Any, recompute: str | None, tokens: int | None, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    model = in_tiles(1, recompute, tokens, **ODD)
    compile_transformer(model, mode)
    found = learned(model)
    assert (calls.count("forward"), calls.count("backward")) == ((2 if recompute == "full" else 1) * 6, 6)
    assert max(error(found, learned(made(**ODD))).values()) < 1e-5


@pytest.mark.parametrize("norms", [False, True])
def test_the_operators_are_what_the_compiler_is_told(norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention(shape(ODD, {"qk_layernorm": "head" if norms else None}), 0).bfloat16()
    seen: list[tuple[Any, ...]] = []
    real = head_tiles._forward
    model.tiled = 1
    x = torch.randn(2, 17, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(head_tiles, "_forward", lambda *args: seen.append(args) or real(*args))
    model(x, None, None)
    monkeypatch.setattr(head_tiles, "_forward", real)
    (args,) = seen
    tests = ("test_schema", "test_faketensor")
    with torch.no_grad():
        torch.library.opcheck(head_tiles._forward, args, test_utils=tests)
        out, lse = head_tiles._forward(*args)
        of_backward = (torch.randn_like(x), model.linear_proj.weight, out, lse, *args)
        torch.library.opcheck(head_tiles._backward, of_backward, test_utils=tests)


def linear_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the reference passes that take no memory besides their results, as kernels do."""

    def forward(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return q.clone(), q.new_zeros(q.transpose(1, 2).shape[:3]), None

    def backward(dout: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return q.clone(), k.clone(), v.clone(), None

    monkeypatch.setattr(BACKENDS["reference"], "PASSES", Passes(forward, backward))


def test_the_tensors_of_one_tile_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    linear_memory(monkeypatch)
    for name in ("_forward", "_backward"):  # what is allocated within an operator is not seen
        monkeypatch.setattr(head_tiles, name, getattr(head_tiles, name)._init_fn)
    T, C, H, G, D = 2048, 64, 16, 8, 4
    config = shape({"hidden_size": C, "num_attention_heads": H, "num_query_groups": G})
    peaks = []
    for groups in (G, 2, 1):
        attention, x, dy = Attention(config, 0), torch.randn(1, T, C, requires_grad=True), torch.ones(1, T, C)
        attention.tiled = groups
        with Allocated() as allocated:
            attention(x, None, None).backward(dy)
        peaks.append(allocated.peak / (4 * T))
    # The output. Of all heads: what attention gave, and the gradient of what the first product gave. Of a tile: its
    # queries, keys and values, their gradients, what attention gave and its gradient. When all tiles are done: the
    # input's gradient.
    qkv = (H + 2 * G) * D
    for peak, groups in zip(peaks, (G, 2, 1), strict=True):
        tile = (2 * qkv + (2 if groups < G else 1) * H * D) * groups / G
        assert peak == pytest.approx(C + H * D + H + qkv + max(tile, C), rel=0.05)


def test_caches_and_passes_without_gradients_are_served() -> None:
    plain, tiled = made(**ODD), in_tiles(1, **ODD)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = plain(ids)
        torch.testing.assert_close(tiled(ids), expected)
        caches = [KVCache.allocate(2, 6, 3, 40, torch.float32, "cpu") for _ in range(2)]
        found = [tiled(part, caches=caches) for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


def test_impossible_tiles_are_named() -> None:
    def said(groups: Any, recompute: Any = None, fp8: Any = None) -> list[str]:
        return [str(each) for each in Computation("layers", recompute, fp8, tiled_attention=groups).problems()]

    assert said(1, "full") == said(8) == said(None, 0.5, "rowwise") == []
    for bad in (0, -1, True, 1.5, "2"):
        (problem,) = said(bad)
        assert problem.startswith("tiled_attention=") and "whole number" in problem
    for others, word in (((0.5,), "'selective'"), ((None, "rowwise"), "fp8=None")):
        (problem,) = said(1, *others)
        assert problem.startswith("tiled_attention=1") and word in problem


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (
            {"num_attention_heads": 6, "num_query_groups": 6, "kv_channels": 8},
            "does not divide the 6 key/value heads; allowed: 1, 2, 3",
        ),
        ({"num_query_groups": 2}, "does not divide the 2"),
        ({"num_query_groups": 4, "qk_layernorm": "projection"}, "norms all heads together"),
        ({"num_query_groups": 4, "attention_sinks": True}, "has no sinks"),
        ({"num_query_groups": 4, "attention_dropout": 0.1}, "has no dropout"),
    ],
)
def test_attention_that_has_no_tiles_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        in_tiles(4, **changes)


def test_a_plan_refuses_what_does_not_go_with_tiles() -> None:
    def said(sizes: Sizes, **changes: Any) -> list[str]:
        model = LanguageModel(shape(), tiled_attention=1, **changes)
        return [str(problem) for problem in model.problems("32-true", sizes)]

    assert said(Sizes(4, 4)) == []
    for sizes, word in ((Sizes(2, 1, tensor=2), "tensor_parallel=1"), (Sizes(2, 1, context=2), "context_parallel=1")):
        (problem,) = said(sizes)
        assert problem.startswith("model.tiled_attention=1: ranks share") and word in problem
    (problem,) = said(Sizes(1, 1), lora=LoRA(), init_from="somewhere")
    assert problem.startswith("model.tiled_attention=1: adapters change") and "model.lora=None" in problem
    with pytest.raises(ConfigError, match="adapters change"):
        model = made(lora=LoRA(rank=2))
        tile_attention(model, 1)


# -- on a GPU


LONG: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 2048,
    "kv_channels": 64,
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", [None, "layers"])
def test_on_a_gpu_a_step_with_tiles_needs_less_memory(
    mode: Any, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's step of 131,072 tokens, whose tensors of the width of the stream are 512 MiB each."""
    monkeypatch.undo()
    tokens, stream = 2**17, 2**17 * 2048 * 2
    peaks, outputs = [], []
    for groups in (None, 8, 2, 1):
        torch.manual_seed(0)
        config = shape(LONG)
        with torch.device("cuda"):
            model = Transformer(config).bfloat16()
        tile_mlp(model, 4096)
        if groups is not None:
            tile_attention(model, groups)
        recompute_activations(model, "full")
        if mode is not None:
            compile_transformer(model, mode)
        x = torch.randn(1, tokens, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        places = model.places(torch.zeros(1, tokens, dtype=torch.int64, device="cuda"))
        for _ in range(2):  # the first one compiles
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = model.run_layers(model.layers, x, places)
            out.backward(out.detach())
            del out
            peaks.append((torch.cuda.max_memory_allocated() - before) / stream)
        assert x.grad is not None
        outputs.append(x.grad)
    whole, _, two, one = peaks[1::2]
    print(f"{mode}: in tensors as large as the input: {[round(peak, 2) for peak in peaks[1::2]]}")
    assert one <= two < whole - 3
    for found in outputs[1:]:
        assert float((found - outputs[0]).norm() / outputs[0].norm()) < 0.01


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4", "sdpa_flash", "cudnn"])
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_gradients_are_as_close_as_without_tiles(name: str, packed: bool) -> None:
    heads = {"kv_channels": 72, "qk_layernorm": "head"}
    config = shape(LONG, heads, {"attention_backend": name})
    torch.manual_seed(0)
    with torch.device("cuda"):
        exact = Attention(shape(LONG, heads), 0).bfloat16().double()
    x, dy = (torch.randn(2, 777, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rope = config.rotary(0).tables(torch.arange(777, device="cuda"), 777)
    borders = torch.tensor([0, 5, 5, 400, 777, 1500, 1554], dtype=torch.int32, device="cuda")
    documents = Documents(borders, 777) if packed else None
    results = []
    for groups, dtype in ((None, torch.float64), (None, torch.bfloat16), (1, torch.bfloat16), (4, torch.bfloat16)):
        with torch.device("cuda"):
            module = exact if dtype == torch.float64 else Attention(config, 0).to(dtype)
        module.load_state_dict(exact.state_dict())
        module.tiled = groups
        given = x.to(dtype).requires_grad_()
        try:
            out = module(given, rope, documents)
        except ConfigError as refused:
            pytest.skip(str(refused)[:200])
        results.append([out.detach(), *torch.autograd.grad(out, [given, *module.parameters()], dy.to(dtype))])
    right, plain, *tiled = results
    for found in tiled:
        for got, other, wanted in zip(found, plain, right, strict=True):
            errors = [float((each.double() - wanted).norm() / wanted.norm()) for each in (got, other)]
            assert errors[0] <= 1.3 * errors[1] + 1e-4
