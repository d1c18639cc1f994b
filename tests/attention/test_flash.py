"""The three flash-attn packages: which calls they refuse, how they are called, and how torch.compile traces them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from fiddlehead.attention.backends import flash2, flash3, flash4, reference
from fiddlehead.attention.backends.backend import Extras
from fiddlehead.attention.packages import Package, Packages
from fiddlehead.attention.spec import GPUS, AttentionSpec, Target
from fiddlehead.errors import ConfigError

MODULES = {"flash2": flash2, "flash3": flash3, "flash4": flash4}
VERSIONS = {"flash2": "2.8.3", "flash3": "3.0.0", "flash4": "4.0.0b36"}


def spec(**changes: Any) -> AttentionSpec:
    """Llama 3's layers in training, but for the changes."""
    plain = AttentionSpec(dtype=torch.bfloat16, head_dim=128, num_attention_heads=32, num_query_groups=8)
    return replace(plain, **changes)


def target(gpu: str, **versions: str | None) -> Target:
    """A GPU where all three packages are installed, but for the versions given."""
    packages = {name: Package(version) for name, version in {**VERSIONS, **versions}.items()}
    return Target("cuda", gpu, GPUS[gpu], Packages("2.11.0", "9.19.0", **packages))


CACHE = {"cached": True, "same_length": False, "training": False}
SMALL_256 = {"head_dim": 256, "dropout": 0.1}

REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    # flash-attn 2
    ("flash2", {}, "v100", "sm70: made for sm80 to sm121"),
    ("flash2", {"dtype": torch.float32}, "h100", "float32: only float16 and bfloat16"),
    ("flash2", {"head_dim": 264}, "h100", "head_dim=264: at most 256"),
    ("flash2", {"head_dim": 100}, "h100", "head_dim=100: only multiples of 8"),
    *(("flash2", SMALL_256, gpu, "no gradients above 192") for gpu in ("a10g", "l40s", "rtx5090")),
    ("flash2", {"softcap": 30.0, "dropout": 0.1}, "h100", "softcap with dropout"),
    ("flash2", {"sinks": True}, "h100", "sinks"),
    ("flash2", {"padding_mask": True}, "h100", "padding_mask: takes none; pack the sequences instead (cu_seqlens)"),
    ("flash2", {**CACHE, "training": True}, "h100", "cache: has no gradients"),
    ("flash2", {**CACHE, "dropout": 0.1}, "h100", "cache: has no dropout"),
    ("flash2", {**CACHE, "page_size": 128}, "h100", "page_size=128: only multiples of 256"),
    # flash-attn 3
    ("flash3", {}, "a100", "sm80: made for sm90 (Hopper) (preference)"),
    ("flash3", {}, "l40s", "sm89: made for sm90 (Hopper) (preference)"),
    ("flash3", {}, "b200", "sm100: made for sm90 (Hopper)"),
    ("flash3", {}, "t4", "sm75: made for sm90 (Hopper)"),
    ("flash3", {"dtype": torch.float32}, "h100", "float32: only float16 and bfloat16"),
    ("flash3", {"head_dim": 264}, "h100", "head_dim=264: at most 256"),
    ("flash3", {"head_dim": 100}, "h100", "head_dim=100: only multiples of 8"),
    ("flash3", {"head_dim": 200, "deterministic": True}, "h100", "deterministic: not with head_dim=200"),
    ("flash3", {"dropout": 0.1}, "h100", "dropout"),
    ("flash3", {"alibi": True}, "h100", "alibi"),
    ("flash3", {"sinks": True}, "h100", "sinks"),
    ("flash3", {"padding_mask": True}, "h100", "padding_mask: takes none; pack the sequences instead (cu_seqlens)"),
    ("flash3", {**CACHE, "training": True}, "h100", "cache: has no gradients"),
    # flash-attn 4
    ("flash4", {}, "v100", "sm70: made for sm80 to sm121"),
    ("flash4", {}, "a100", "training: no gradients on sm80"),
    ("flash4", {}, "l4", "training: no gradients on sm89"),
    ("flash4", {"dtype": torch.float32}, "h100", "float32: only float16 and bfloat16"),
    ("flash4", {"head_dim": 100}, "h100", "head_dim=100: only multiples of 8"),
    ("flash4", {"head_dim": 264}, "h100", "head_dim=264: at most 256 on sm90"),
    ("flash4", {"head_dim": 192}, "b200", "head_dim=192: at most 128, or 256, on sm100"),
    ("flash4", {"head_dim": 192}, "b300", "head_dim=192: at most 128, or 256, on sm103"),
    ("flash4", {"head_dim": 200, "training": False}, "l40s", "head_dim=200: at most 192 on sm89"),
    ("flash4", {"head_dim": 168}, "rtx5090", "head_dim=168: at most 160 on sm120 in training"),
    ("flash4", {"dropout": 0.1}, "h100", "dropout"),
    ("flash4", {"alibi": True}, "h100", "alibi"),
    ("flash4", {"padding_mask": True}, "h100", "padding_mask: takes none; pack the sequences instead (cu_seqlens)"),
    ("flash4", {"sinks": True, "training": False}, "a100", "sinks: has none on sm80"),
    ("flash4", {"sinks": True}, "rtx5090", "sinks: has none on sm120"),
    ("flash4", {"deterministic": True}, "rtx5090", "deterministic"),
    ("flash4", {"head_dim": 256, "softcap": 30.0}, "b200", "softcap: no gradients with head_dim=256"),
    ("flash4", {"head_dim": 256, "sinks": True}, "b200", "sinks: no gradients with head_dim=256"),
    ("flash4", {"head_dim": 256, "window_size": (64, 0)}, "b200", "window: no gradients with head_dim=256"),
    ("flash4", {**CACHE, "training": True}, "h100", "cache: has no gradients (preference)"),
    ("flash4", {**CACHE, "page_size": 256, "training": True}, "h100", "cache: has no gradients"),
    ("flash4", {**CACHE, "page_size": 256}, "a100", "paged cache: has none on sm80"),
    ("flash4", {**CACHE, "page_size": 256}, "rtx5090", "paged cache: has none on sm120"),
    ("flash4", {**CACHE, "page_size": 256, "head_dim": 72}, "h100", "multiples of 16, not 72"),
]

SERVED: list[tuple[str, dict[str, Any], str]] = [
    # Each is beside a refusal: what that one rules out, and no more.
    *(("flash2", {}, gpu) for gpu in ("a100", "l40s", "h100", "b200", "rtx5090")),
    ("flash2", {"head_dim": 256, "dropout": 0.1}, "h100"),
    ("flash2", {"head_dim": 256}, "l40s"),
    ("flash2", {"head_dim": 192, "dropout": 0.1}, "l40s"),
    ("flash2", {"head_dim": 256, "dropout": 0.1, "training": False}, "l40s"),
    ("flash2", {"softcap": 30.0, "window_size": (64, 0), "alibi": True, "packed": True, "deterministic": True}, "h100"),
    ("flash2", {"causal": False, "same_length": False}, "h100"),
    ("flash2", {**CACHE, "page_size": 512, "alibi": True}, "a100"),
    ("flash3", {"head_dim": 192, "deterministic": True, "dtype": torch.float16}, "h100"),
    ("flash3", {"head_dim": 256, "softcap": 30.0, "window_size": (64, 0), "packed": True}, "h200"),
    ("flash3", {"head_dim": 256, "deterministic": True, "training": False}, "h100"),
    ("flash3", {**CACHE, "page_size": 48}, "h100"),
    *(("flash4", {}, gpu) for gpu in ("h100", "b200", "b300", "rtx5090")),
    ("flash4", {"training": False, "head_dim": 256}, "a100"),
    ("flash4", {"training": False, "head_dim": 192}, "l40s"),
    ("flash4", {"head_dim": 192, "sinks": True, "softcap": 30.0, "deterministic": True, "packed": True}, "h100"),
    ("flash4", {"head_dim": 256, "deterministic": True}, "b200"),
    ("flash4", {"head_dim": 256, "softcap": 30.0, "training": False}, "b200"),
    ("flash4", {**CACHE, "page_size": 16, "head_dim": 96}, "h100"),
    ("flash4", CACHE, "a100"),
]


@pytest.mark.parametrize(("name", "changes", "gpu", "reason"), REFUSED)
def test_a_call_that_the_package_cannot_serve_is_refused_with_the_reason(
    name: str, changes: dict[str, Any], gpu: str, reason: str
) -> None:
    assert reason in (MODULES[name].why_not(spec(**changes), target(gpu)) or "it does not refuse")


@pytest.mark.parametrize(("name", "changes", "gpu"), SERVED)
def test_a_call_that_the_package_can_serve_is_not_refused(name: str, changes: dict[str, Any], gpu: str) -> None:
    assert MODULES[name].why_not(spec(**changes), target(gpu)) is None


@pytest.mark.parametrize(
    ("name", "gpu", "version", "reason"),
    [
        ("flash2", "h100", None, "flash-attn is not installed"),
        ("flash3", "h100", None, "flash-attn-3 is not installed"),
        ("flash4", "h100", None, "flash-attn-4 is not installed"),
        ("flash2", "h100", "2.6.3", "flash-attn 2.6.3 is installed but too old: at least 2.7.0 is needed"),
        ("flash2", "b200", "2.7.2.post1", "flash-attn 2.7.2.post1 is installed but too old: at least 2.7.3 is needed"),
        ("flash4", "h100", "4.0.0b9", "flash-attn-4 4.0.0b9 is installed but too old: at least 4.0.0b36 is needed"),
    ],
)
def test_refuses_a_package_that_is_missing_or_too_old(name: str, gpu: str, version: str | None, reason: str) -> None:
    assert MODULES[name].why_not(spec(), target(gpu, **{name: version})) == reason


@pytest.mark.parametrize(
    ("name", "gpu", "version"),
    [
        ("flash2", "b200", "2.7.3"),
        ("flash2", "h100", "2.7.0.post2"),
        ("flash2", "h100", "2.10.0+cu130"),
        ("flash3", "h100", "3.0.0b1"),
        ("flash4", "h100", "4.1.0"),
    ],
)
def test_other_versions_of_a_package_can_serve(name: str, gpu: str, version: str) -> None:
    assert MODULES[name].why_not(spec(), target(gpu, **{name: version})) is None


@pytest.mark.parametrize("name", MODULES)
def test_refuses_a_broken_package_and_a_cpu(name: str) -> None:
    broken = replace(target("h100").packages, **{name: Package(VERSIONS[name], "its import fails: ImportError: x")})
    reason = MODULES[name].why_not(spec(), replace(target("h100"), packages=broken))
    assert reason is not None and reason.endswith("is installed but its import fails: ImportError: x")
    assert MODULES[name].why_not(spec(), Target("cpu", "cpu", (0, 0), broken)) == "needs an NVIDIA GPU, not cpu"


class StandIn:
    """A stand-in for a flash-attn package: the functions that are called, by the reference's arithmetic, on a CPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.splits: list[int] = []
        self.inputs: tuple[torch.Tensor, ...] = ()

    def attend(self, function: str, q: Any, k: Any, v: Any, scale: float, **options: Any) -> Any:
        self.calls.append(function)
        self.inputs = (q, k, v)
        extras = Extras(**{name: options.pop(name) for name in Extras._fields if name in options})
        options.pop("deterministic", None)
        left, right = options.pop("window_size")
        asked = spec(
            dtype=q.dtype,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            packed=extras.cu_seqlens_q is not None,
            cached=extras.cache_lengths is not None,
            page_size=k.shape[1] if extras.page_table is not None else 0,
            **options,
        )
        return reference.run(q, k, v, asked, scale, extras)

    def differentiate(
        self, function: str, dout: Any, q: Any, k: Any, v: Any, scale: float, sinks: Any = None, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        q, k, v, *sinks = leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
        extras = {"sinks": sinks[0]} if sinks else {}

        def gradients() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(self.attend(function, q, k, v, scale, **extras, **options), leaves, dout)

        # Autograd is off where an operator's implementation runs, but not in another thread.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(gradients).result()

    @staticmethod
    def lse(q: torch.Tensor) -> torch.Tensor:
        return q.detach().float().sum(-1).transpose(-1, -2).contiguous()


class StandIn2(StandIn):
    """A stand-in for flash_attn.flash_attn_interface."""

    def flash_attn_with_kvcache(self, q, k, v, cache_seqlens, block_table, softmax_scale, **options) -> Any:
        options |= {"cache_lengths": cache_seqlens, "page_table": block_table}
        return self.attend("flash_attn_with_kvcache", q, k, v, softmax_scale, **options)

    def _flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, window_size_left, window_size_right, return_softmax, **options
    ) -> Any:
        assert not return_softmax
        options |= {"window_size": (window_size_left, window_size_right), "dropout": dropout_p}
        out = self.attend("_flash_attn_forward", q, k, v, softmax_scale, **options)
        return out, self.lse(q), q.new_empty(0), torch.tensor([1, 2])

    def _flash_attn_varlen_forward(self, q, k, v, max_seqlen_q, max_seqlen_k, **options) -> Any:
        assert max_seqlen_q and max_seqlen_k
        return self._flash_attn_forward(q, k, v, **options)

    def _flash_attn_backward(
        self, dout, q, k, v, out, lse, dq, dk, dv, dropout_p, softmax_scale, rng_state, **options
    ) -> None:
        assert torch.equal(lse, self.lse(q)) and rng_state.tolist() == [1, 2] and out.shape == q.shape
        options["window_size"] = (options.pop("window_size_left"), options.pop("window_size_right"))
        gradients = self.differentiate("_flash_attn_backward", dout, q, k, v, softmax_scale, **options)
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)

    def _flash_attn_varlen_backward(self, *tensors, max_seqlen_q, max_seqlen_k, **options) -> None:
        assert max_seqlen_q and max_seqlen_k
        self._flash_attn_backward(*tensors, **options)


class StandIn3(StandIn):
    """A stand-in for flash_attn_interface."""

    def flash_attn_with_kvcache(self, q, k, v, cache_seqlens, page_table, softmax_scale, **options) -> Any:
        options |= {"cache_lengths": cache_seqlens, "page_table": page_table}
        return self.attend("flash_attn_with_kvcache", q, k, v, softmax_scale, **options)

    def _flash_attn_forward(
        self,
        q,
        k,
        v,
        softmax_scale,
        window_size_left,
        window_size_right,
        max_seqlen_q,
        max_seqlen_k,
        num_splits,
        **options,
    ) -> Any:
        self.splits.append(num_splits)
        assert (max_seqlen_q is None) == (max_seqlen_k is None) == (options["cu_seqlens_q"] is None)
        options["window_size"] = (window_size_left, window_size_right)
        out = self.attend("_flash_attn_forward", q, k, v, softmax_scale, **options)
        return out, self.lse(q), q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        self, dout, q, k, v, out, lse, dq, dk, dv, softmax_scale, is_causal, max_seqlen_q, max_seqlen_k, **options
    ) -> Any:
        assert torch.equal(lse, self.lse(q)) and out.shape == q.shape
        options["window_size"] = (options.pop("window_size_left"), options.pop("window_size_right"))
        options["causal"] = is_causal
        gradients = self.differentiate("_flash_attn_backward", dout, q, k, v, softmax_scale, **options)
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)


class StandIn4(StandIn):
    """A stand-in for flash_attn.cute.interface."""

    def attend(self, function: str, q: Any, k: Any, v: Any, scale: float, **options: Any) -> Any:
        assert -1 not in options["window_size"], "which would be a limit"
        return super().attend(function, q, k, v, scale, **options)

    def flash_attn_varlen_func(self, q, k, v, seqused_k, softmax_scale, learnable_sink, num_splits, **options) -> Any:
        self.splits.append(num_splits)
        options |= {"cache_lengths": seqused_k, "sinks": learnable_sink}
        return self.attend("flash_attn_varlen_func", q, k, v, softmax_scale, **options), None

    def _flash_attn_fwd(self, q, k, v, softmax_scale, learnable_sink, return_lse, num_splits, **options) -> Any:
        self.splits.append(num_splits)
        assert options.pop("max_seqlen_q") == options.pop("max_seqlen_k")
        options["window_size"] = (options.pop("window_size_left"), options.pop("window_size_right"))
        out = self.attend("_flash_attn_fwd", q, k, v, softmax_scale, sinks=learnable_sink, **options)
        return out, self.lse(q) if return_lse else None, None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, softmax_scale, learnable_sink, dq, dk, dv, max_seqlen_q, max_seqlen_k, **options
    ) -> Any:
        assert torch.equal(lse, self.lse(q)) and out.shape == q.shape
        options["window_size"] = (options.pop("window_size_left"), options.pop("window_size_right"))
        gradients = self.differentiate("_flash_attn_bwd", dout, q, k, v, softmax_scale, sinks=learnable_sink, **options)
        for into, gradient in zip((dq, dk, dv), gradients, strict=False):
            into.copy_(gradient)
        return dq, dk, dv, *gradients[3:]


STAND_INS = {"flash2": StandIn2, "flash3": StandIn3, "flash4": StandIn4}


@pytest.fixture(params=MODULES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def package(name: str, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in that the backend `name` calls."""
    package = STAND_INS[name]()
    monkeypatch.setattr(MODULES[name], "function", lambda _package, function: getattr(package, function))
    monkeypatch.setattr(flash4, "_splits", lambda _device: 0)
    monkeypatch.setattr(flash4, "_on_hopper", lambda _device: False)
    torch._dynamo.reset()
    return package


B, T, H, G, D = 2, 5, 4, 2, 8
SCALE = 0.3
BORDERS = torch.tensor([0, 3, T], dtype=torch.int32)
PACKED = Extras(cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS, max_seqlen_q=3, max_seqlen_k=3)


def small(**changes: Any) -> AttentionSpec:
    return spec(dtype=torch.float32, head_dim=D, num_attention_heads=H, num_query_groups=G, **changes)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def fused(*lead: int) -> list[torch.Tensor]:
    """q, k and v as views of one tensor, as a fused projection yields them."""
    return [x.requires_grad_() for x in draw(*lead, H + 2 * G, D).split([H, G, G], dim=-2)]


def cases(name: str) -> list[tuple[AttentionSpec, Extras, list[torch.Tensor]]]:
    """Calls in training with the features of the package."""
    plain = [
        (small(), Extras(), fused(B, T)),
        (small(causal=False, window_size=(2, -1)), Extras(), fused(B, T)),
        (small(window_size=(2, 0), softcap=2.0, deterministic=True), Extras(), fused(B, T)),
        (small(packed=True), PACKED, fused(T)),
    ]
    if name == "flash2":
        plain.append((small(alibi=True), Extras(alibi_slopes=draw(H).abs()), fused(B, T)))
    if name == "flash4":
        plain.append((small(sinks=True), Extras(sinks=draw(H).requires_grad_()), fused(B, T)))
        plain.append((small(sinks=True, packed=True), PACKED._replace(sinks=draw(H).requires_grad_()), fused(T)))
    return plain


def outcome(run: Callable[..., torch.Tensor], s: AttentionSpec, extras: Extras, inputs: list[torch.Tensor]) -> Any:
    """The output and the gradients."""
    leaves = [*inputs, *([extras.sinks] if extras.sinks is not None else [])]
    out = run(*inputs, s, SCALE, extras)
    return [out, *torch.autograd.grad(out, leaves, draw(*out.shape))]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_eager_calls_the_package_with_the_tensors_as_they_are(name: str, package: StandIn) -> None:
    for s, extras, inputs in cases(name):
        expected = outcome(reference.run, s, extras, inputs)
        given = [x.data_ptr() for x in inputs]
        assert_equal(outcome(MODULES[name].run, s, extras, inputs), expected)
        assert len(package.calls) == 2, "the forward and the backward function, once each"
        assert [x.data_ptr() for x in package.inputs] == given[:3]
        package.calls.clear()
    assert set(package.splits) <= {1}


@pytest.mark.parametrize("page_size", [0, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_decodes_from_a_cache(name: str, package: StandIn, page_size: int, compiled: bool) -> None:
    S = 6
    extras = Extras(cache_lengths=torch.tensor([4, S], dtype=torch.int32))
    q, k, v = draw(B, 2, H, D), draw(B, S, G, D), draw(B, S, G, D).flip(1)
    if page_size:
        extras = extras._replace(page_table=torch.tensor([[5, 0, 2], [1, 4, 3]], dtype=torch.int32))
        k, v = (x.reshape(-1, page_size, G, D) for x in (k, v))
    s = small(page_size=page_size, **CACHE)
    graphs: list[list[str]] = []

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return MODULES[name].run(q, k, v, s, SCALE, extras)

    call = recording(call, graphs) if compiled else call
    torch.testing.assert_close(call(q, k, v), reference.run(q, k, v, s, SCALE, extras))
    assert package.calls == ["flash_attn_varlen_func" if name == "flash4" else "flash_attn_with_kvcache"]
    assert graphs == ([[f"fiddlehead.{name}.default"]] if compiled else [])
    assert set(package.splits) <= {0}


def test_decoding_lets_the_kernel_split_the_keys(name: str, package: StandIn) -> None:
    MODULES[name].run(draw(B, 1, H, D), draw(B, 9, G, D), draw(B, 9, G, D), small(training=False), SCALE, Extras())
    assert package.splits == ([] if name == "flash2" else [0])  # flash-attn 2 always does


def test_flash4_splits_the_keys_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, splits in (("a100", 1), ("h100", 1), ("b200", 0), ("rtx5090", 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, gpu=gpu: GPUS[gpu])
        flash4._splits.cache_clear()
        assert flash4._splits(torch.device("cuda", 0)) == splits
    flash4._splits.cache_clear()


def test_flash4_pads_gradients_where_tiles_of_16_and_32_channels_differ() -> None:
    for head_dim in range(8, 257, 8):
        in_16s, in_32s = -(-head_dim // 16) * 16, -(-head_dim // 32) * 32
        differ = head_dim <= 128 and in_16s != in_32s
        assert flash4.gradient_padding(head_dim) == (in_32s - head_dim if differ else 0)


@pytest.mark.parametrize("name", ["flash4"], indirect=True)
def test_gradients_of_padded_heads_are_those_of_the_heads(
    name: str, package: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    backward = package._flash_attn_bwd  # type: ignore[attr-defined]
    monkeypatch.setattr(package, "lse", lambda q: torch.zeros(q.shape[:-1], dtype=torch.float32))
    monkeypatch.setattr(
        package, "_flash_attn_bwd", lambda q, *rest, **o: (seen.append(q.shape[-1]), backward(q, *rest, **o))[1]
    )
    monkeypatch.setattr(flash4, "_on_hopper", lambda _device: True)
    for s, extras, inputs in cases(name):
        actual = outcome(flash4.run, s, extras, inputs)
        assert_equal(actual, outcome(reference.run, s, extras, inputs))
        assert all(x.is_contiguous() for x in actual[1:])
    assert set(seen) == {32}


def recording(call: Callable[..., Any], graphs: list[list[str]]) -> Callable[..., Any]:
    """Compiles, and writes down the operators of each graph."""

    def record(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        graphs.append([name for name in names if name.startswith("fiddlehead.")])
        return make_boxed_func(module.forward)

    return torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record))


def test_compiled_is_one_operator_forward_and_one_backward(name: str, package: StandIn) -> None:
    for s, extras, inputs in cases(name):
        torch._dynamo.reset()
        expected = outcome(reference.run, s, extras, inputs)
        graphs: list[list[str]] = []
        compiled = recording(lambda q, k, v, s, scale, extras: MODULES[name].run(q, k, v, s, scale, extras), graphs)
        assert_equal(outcome(compiled, s, extras, inputs), expected)
        assert graphs == [[f"fiddlehead.{name}_forward.default"], [f"fiddlehead.{name}_backward.default"]]
        assert len(package.calls) == 2, "the forward and the backward function, once each"
        package.calls.clear()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_serves_other_lengths_by_the_same_graph(name: str, package: StandIn, backend: str) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return MODULES[name].run(q, k, v, small(), SCALE, Extras())

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for length in (3, 7, 12):
        inputs = fused(B, length)
        with torch.compiler.set_stance("default" if length == 3 else "fail_on_recompile"):
            actual = outcome(lambda q, k, v, *_: compiled(q, k, v), small(), Extras(), inputs)
        assert_equal(actual, outcome(reference.run, small(), Extras(), inputs))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own, when it looks at what `opcheck` gives it
def test_operators_are_what_they_say(name: str, package: StandIn) -> None:
    """Schema, fake tensors, gradients and tracing, by PyTorch's own checks."""
    operators = torch.ops.fiddlehead
    for s, extras, inputs in cases(name)[2:]:  # the first two differ from the third in numbers alone
        borders = (extras.cu_seqlens_q, extras.cu_seqlens_k)
        numbers = (3, 3, s.causal, *s.window_size, s.softcap, 0.0, SCALE, s.deterministic)
        call = (*borders, extras.alibi_slopes, extras.sinks, None, None, *numbers)
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.library.opcheck(getattr(operators, f"{name}_forward").default, (*leaves, *call))
        saved = getattr(operators, f"{name}_forward")(*inputs, *call)
        without = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*inputs, *saved, *call)]
        torch.library.opcheck(getattr(operators, f"{name}_backward").default, (draw(*inputs[0].shape), *without))
        torch.library.opcheck(getattr(operators, name).default, (*without[:3], *without[6:]))


def test_only_operators_with_dropout_are_random() -> None:
    tagged = [
        name + suffix
        for name in MODULES
        for suffix in ("", "_forward", "_backward")
        if torch.Tag.nondeterministic_seeded in getattr(torch.ops.fiddlehead, name + suffix).default.tags
    ]
    assert tagged == ["flash2", "flash2_forward"]


@pytest.mark.parametrize("compiled", [False, True])
def test_missing_features_of_a_build_are_named(
    name: str, package: StandIn, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("This flash attention build does not support tanh softcapping.\nException raised from ...")

    monkeypatch.setattr(STAND_INS[name], "attend", refuse)
    run = MODULES[name].run
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="eager")
    switch = f"NVTE_FLASH_ATTN_V{name[-1]}=0"
    with pytest.raises(ConfigError, match=rf"attention_backend='{name}': .* without tanh softcapping; .* {switch}"):
        run(*fused(B, T), small(softcap=2.0), SCALE, Extras())


def test_other_errors_of_a_package_are_left_alone(name: str, package: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(STAND_INS[name], "attend", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        MODULES[name].run(*fused(B, T), small(), SCALE, Extras())
