"""A decoding step with kernels of its own: against the model itself, and the kernels against float64.

pytest -m gpu tests/models/test_fused_step.py
TRITON_INTERPRET=1 pytest tests/models/test_fused_step.py     without a GPU, where Triton is installed
"""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead.attention import KVCache
from fiddlehead.errors import ConfigError
from fiddlehead.inference import generation, speculative
from fiddlehead.inference.generation import Sampling, sample, sample_batch
from fiddlehead.inference.speculative import Draft
from fiddlehead.models import Transformer, TransformerConfig, compiled_step, fused_step
from fiddlehead.models.fused_step import FusedStep, fits
from fiddlehead.models.int8 import Int8Linear, to_int8
from fiddlehead.models.rope import RopeScaling, Rotary, rotate
from tests.triton_kernels import DEVICE, NEEDS_KERNELS

SIZES = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "vocab_size": 83, "init_method_std": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "gqa, tied": {"num_query_groups": 2, "share_embeddings_and_output_weights": True, "rope_scaling": RopeScaling()},
    "mqa, wide heads": {"num_query_groups": 1, "kv_channels": 20, "ffn_hidden_size": 52},
    "norms and biases": {"qk_layernorm": "head", "add_qkv_bias": True, "num_query_groups": 3},
    "biases": {"add_bias_linear": True, "rotary_percent": 0.5, "softmax_scale": 0.2},
    "windows": {"window_size": (4, 0), "window_attn_skip_freq": 2, "rotary_base_local": 100.0},
    "geglu": {"activation": "geglu", "layernorm_zero_centered_gamma": True, "embedding_multiplier": 7.0},
    "factors": {"residual_multiplier": 0.22, "logits_scaling": 8.0, "final_logit_softcapping": 30.0},
    "no positions": {"position_embedding_type": "none", "num_query_groups": 2},
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter multiplies no bfloat16


def transformer(dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    return model.to(device, dtype)


def defined_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    added: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """`decode_kernels.product` in float64."""
    y = x.double()
    if gain is not None:
        y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * gain.double()
    y = y @ weight.double().T
    y = y if scale is None else y * scale.double()
    y = y if bias is None else y + bias.double()
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        y = (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    y = y * factor
    return (y if added is None else y + added.double()).to(x.dtype)


def defined_attention(
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    heads: int,
    left: int = -1,
    gains: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """`decode_kernels.attend_to_cache` in float64, one token after the other."""
    (G, D), T, outs = k.shape[2:], qkv.shape[0] // k.shape[0], []
    for number, row in enumerate(qkv):
        b, place = number // T, int(lengths[number // T]) + number % T
        q, new, new_value = row.view(-1, D).split([heads, G, G])
        if gains is not None:
            q, new = (
                (t.double() * (t.double().square().mean(-1, keepdim=True) + eps).rsqrt() * gain.double()).to(t.dtype)
                for t, gain in zip((q, new), gains, strict=True)
            )
        if rope is not None:
            angles = tuple(table[place : place + 1, None] for table in rope)
            q, new = (rotate(t[None, None], angles)[0, 0] for t in (q, new))  # type: ignore[arg-type]
        k[b, place], v[b, place] = new, new_value
        first = 0 if left < 0 else max(0, place - left)
        keys, values = (t[b, first : place + 1].double().repeat_interleave(heads // G, dim=1) for t in (k, v))
        weights = (torch.einsum("hd,shd->hs", q.double(), keys) * scale).softmax(dim=-1)
        outs.append(torch.einsum("hs,shd->hd", weights, values).flatten())
    return torch.stack(outs).to(qkv.dtype)


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions of the kernels in their place."""
    made = SimpleNamespace(product=defined_product, attend_to_cache=defined_attention)
    monkeypatch.setitem(sys.modules, "fiddlehead.models.decode_kernels", made)  # type: ignore[arg-type]
    monkeypatch.setattr("fiddlehead.models.decode_kernels", made, raising=False)
    monkeypatch.setattr(fused_step, "_has_kernels", lambda device: True)


def caches_of(model: Transformer, prompts: list[list[int]], room: int) -> tuple[list[KVCache], torch.Tensor]:
    """Caches that hold the prompts, and the likeliest next tokens."""
    config, weight = model.config, model.embedding.weight
    caches = [
        KVCache.allocate(len(prompts), room, config.groups, config.head_dim, weight.dtype, weight.device)
        for _ in range(config.num_layers)
    ]
    with torch.no_grad():
        return caches, generation._begin(model, caches, prompts, compile=True).argmax(-1, keepdim=True)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_step_is_the_model_s(name: str, int8: bool, definitions: None) -> None:
    model = transformer(**MODELS[name])
    if int8:
        to_int8(model)
    assert fits(model)
    caches, tokens = caches_of(model, PROMPTS, 20)
    others = copy.deepcopy(caches)
    step = FusedStep(model, caches)
    for T in (1, 1, 4, 1, 3):
        tokens = (tokens[:, :1] + torch.arange(T)) % 83
        expected = model.logits(model.hidden(tokens, caches=others))
        torch.testing.assert_close(step(tokens), expected, rtol=1e-4, atol=1e-4)
        tokens = expected.argmax(-1)
    for cache, other in zip(caches, others, strict=True):
        assert torch.equal(cache.lengths, other.lengths) and cache.length == other.length
        torch.testing.assert_close(cache.k, other.k, rtol=1e-4, atol=1e-4)


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> list[FusedStep | None]:
    """Compiled steps are neither compiled nor captured, and are listed by what they run."""
    monkeypatch.setattr(compiled_step, "refuse_compiled_step", lambda *arguments: None)
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: None)
    made: list[FusedStep | None] = []

    class Uncaptured(compiled_step.CompiledStep):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._warm_up = 99
            made.append(self._fused)

    for module in (generation, speculative):
        monkeypatch.setattr(module, "CompiledStep", Uncaptured)
    return made


def test_a_compiled_step_takes_it_for_one_sequence_and_writes_the_same(
    definitions: None, uncaptured: list[FusedStep | None]
) -> None:
    model, greedy = transformer(**MODELS["gqa, tied"]), Sampling(temperature=0)
    plain = sample_batch(model, PROMPTS, 9, greedy)
    assert sample_batch(model, PROMPTS, 9, greedy, compile=True) == plain
    assert list(sample(model, PROMPTS[0], 9, temperature=0, compile=True)) == plain[0]
    assert uncaptured[0] is None and len(uncaptured) == 2 and uncaptured[1] is not None


@pytest.mark.parametrize("limit", [None, 17, 18])
@pytest.mark.parametrize("other", [{"num_layers": 1}, {"vocab_size": 90}, {"seq_length": 7}, {}], ids=str)
def test_so_do_a_model_and_its_draft(
    other: dict[str, Any], limit: int | None, definitions: None, uncaptured: list[FusedStep | None]
) -> None:
    changes = MODELS["windows"] | {"seq_length": limit}
    model, draft = transformer(**changes), Draft(transformer(**(changes | other)))
    for prompt in PROMPTS:
        plain = list(sample(model, prompt, 12, temperature=0))
        assert list(sample(model, prompt, 12, temperature=0, compile=True, draft=draft)) == plain
    assert uncaptured and None not in uncaptured
    if not other:
        assert draft.tokens_per_pass > 3
        sampling = {"seed": 3, "top_k": 9, "draft": draft}
        assert list(sample(model, [5], 12, compile=True, **sampling)) == list(sample(model, [5], 12, **sampling))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "LayerNorm"},
        {"norm_placement": "both"},
        {"qk_layernorm": "projection"},
        {"activation": "gelu"},
        {"activation": "clamped_swiglu"},
        {"position_embedding_type": "learned_absolute", "seq_length": 9},
        {"attn_logit_softcapping": 50.0},
        {"attention_sinks": True},
        {"num_moe_experts": 2},
        {"attention_backend": "reference"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_models_are_left_to_the_compiler(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fits(transformer()), "on a CPU"
    monkeypatch.setattr(fused_step, "_has_kernels", lambda device: True)
    assert fits(transformer()) and not fits(transformer(**changes))


def test_so_are_layers_that_are_not_stored_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_step, "_has_kernels", lambda device: True)

    class Other(torch.nn.Linear):
        pass

    model = transformer()
    model.layers[1].mlp.linear_fc1 = Other(48, 384)  # type: ignore[union-attr]
    assert not fits(model)


def test_a_full_cache_is_refused(definitions: None) -> None:
    model = transformer()
    caches, tokens = caches_of(model, [[3, 1]], 3)
    step = FusedStep(model, caches)
    step(tokens)
    with pytest.raises(ConfigError, match="max_length=3: 3 positions are taken, with padding, and 1 more do not fit"):
        step(tokens)


@NEEDS_KERNELS
@pytest.mark.gpu
@pytest.mark.parametrize("options", ["plain", "all", "int8"])
@pytest.mark.parametrize(
    ("B", "K", "N", "dtype", "activation"),
    [
        (1, 64, 48, torch.float32, None),
        (1, 2500, 37, HALF, "swiglu"),
        (1, 8192, 64, HALF, None),
        (2, 100, 37, HALF, "geglu"),
        (5, 512, 130, torch.float32, "swiglu"),
        (16, 600, 33, HALF, None),
        (20, 64, 16, torch.float16, None),
    ],
)
def test_a_product_is_right(B: int, K: int, N: int, dtype: torch.dtype, activation: str | None, options: str) -> None:
    from fiddlehead.models.decode_kernels import product

    torch.manual_seed(0)
    M, device = N * (1 if activation is None else 2), torch.device(DEVICE)
    x, weight = torch.randn(B, K, device=device).to(dtype), (torch.randn(M, K, device=device) / K**0.5).to(dtype)
    more: dict[str, Any] = {"activation": activation}
    if options != "plain":
        more |= {"gain": torch.rand(K, device=device).to(dtype), "eps": 0.1, "factor": 0.5}
        more |= {"bias": torch.randn(M, device=device).to(dtype), "added": torch.randn(B, N, device=device).to(dtype)}
    if options == "int8":
        weight = torch.randint(-127, 128, (M, K), dtype=torch.int8, device=device)
        more["scale"] = torch.rand(M, device=device) / 127 / K**0.5
    found, expected = product(x, weight, **more).double(), defined_product(x.double(), weight, **more)
    error = (found - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


@NEEDS_KERNELS
@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize(
    ("T", "heads", "G", "D", "R", "left", "dtype", "normed"),
    [
        (1, 32, 8, 64, 64, -1, HALF, False),
        (1, 6, 2, 24, 16, 40, torch.float32, True),
        (5, 5, 5, 80, 80, -1, HALF, True),
        (3, 20, 1, 128, 0, 63, torch.float32, False),
        (5, 4, 2, 32, 32, 2, torch.float32, False),
        (1, 2, 1, 256, 256, -1, HALF, False),
    ],
)
def test_attention_to_a_cache_is_right(
    T: int, heads: int, G: int, D: int, R: int, left: int, dtype: torch.dtype, normed: bool, splits: int | None
) -> None:
    from fiddlehead.models.decode_kernels import attend_to_cache

    torch.manual_seed(0)
    S, lengths = 300, torch.tensor([300 - T, 0, 1, 64, 130], dtype=torch.int32, device=DEVICE)
    k, v = torch.randn(2, 5, S, G, D, device=DEVICE).to(dtype)
    qkv = torch.randn(5 * T, (heads + 2 * G) * D, device=DEVICE).to(dtype)
    options: dict[str, Any] = {"scale": D**-0.5, "heads": heads, "left": left, "eps": 0.1}
    if normed:
        options["gains"] = tuple(torch.rand(2, D, device=DEVICE).to(dtype))
    rope = None
    if R:
        cos, sin = Rotary(R, 100.0).tables(torch.arange(S, device=DEVICE), S)
        rope = cos[:, 0].contiguous(), sin[:, 0].contiguous()
    other_k, other_v = k.clone(), v.clone()
    expected = defined_attention(qkv, rope, other_k, other_v, lengths, **options).double()
    found = attend_to_cache(qkv, rope, k, v, lengths, splits=splits, **options).double()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert (found - expected).norm() < bound * expected.norm()
    assert torch.equal(v, other_v), "only the new values are written"
    rest = torch.ones_like(k, dtype=torch.bool)
    for t in range(T):
        rest[torch.arange(5, device=DEVICE), lengths.long() + t] = False
    assert torch.equal(k[rest], other_k[rest]), "only the new keys are written"
    torch.testing.assert_close(k, other_k, rtol=bound, atol=bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_on_a_gpu_logits_are_as_near_to_float64_as_the_model_s(name: str, int8: bool) -> None:
    model = transformer(torch.bfloat16, "cuda", **MODELS[name], attention_backend="reference")
    exact = copy.deepcopy(model).double()
    if int8:
        to_int8(model)
        for layer, other in zip(model.layers, exact.layers, strict=True):
            for name, stored in layer.named_modules():
                if isinstance(stored, Int8Linear):
                    whole = stored.weight.double() * stored.scale.double()[:, None]
                    other.get_submodule(name).weight.data = whole
    caches, tokens = caches_of(model, PROMPTS, 20)
    exact_caches, _ = caches_of(exact, PROMPTS, 20)
    plain_caches = copy.deepcopy(caches)
    step, errors = FusedStep(model, caches), []
    for T in (1, 1, 4, 1, 3):
        tokens = (tokens[:, :1] + torch.arange(T, device="cuda")) % 83
        expected = exact.logits(exact.hidden(tokens, caches=exact_caches))
        plain = model.logits(model.hidden(tokens, caches=plain_caches))
        errors.append([float((each.double() - expected).norm() / expected.norm()) for each in (step(tokens), plain)])
        tokens = expected.argmax(-1)
    ours, theirs = torch.tensor(errors).mean(dim=0).tolist()
    assert ours < 1.5 * theirs < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_captured_steps_write_what_the_model_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, whose rounding changes no likeliest token here."""
    model = transformer(torch.float32, "cuda", **MODELS[name])
    assert fits(model)
    model, greedy = (
        transformer(torch.float32, "cuda", **MODELS[name], attention_backend="reference"),
        Sampling(temperature=0),
    )
    monkeypatch.setattr(compiled_step, "fits", lambda *arguments: True)
    plain = sample_batch(model, PROMPTS, 20, greedy)
    for prompt, written in zip(PROMPTS, plain, strict=True):
        assert list(sample(model, prompt, 20, temperature=0, compile=True)) == written
    drawn = list(sample(model, PROMPTS[0], 20, seed=3, top_k=9, compile=True))
    assert drawn == list(sample(model, PROMPTS[0], 20, seed=3, top_k=9))
    small = transformer(torch.float32, "cuda", **MODELS[name] | {"num_layers": 1}, attention_backend="reference")
    for other in (small, model):
        assert list(sample(model, PROMPTS[2], 20, temperature=0, compile=True, draft=Draft(other))) == plain[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("V", [7, 256, 1000, 128_256])
def test_on_a_gpu_the_likeliest_is_the_first_of_equals(V: int) -> None:
    logits = torch.randn(3, V, device="cuda").bfloat16()
    for row, places in enumerate(([0, V - 1], [V // 2, V - 1], [V - 1])):
        logits[row, places] = 9.0
    assert Sampling(temperature=0).choose(logits, []).tolist() == [0, V // 2, V - 1]
