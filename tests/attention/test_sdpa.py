"""The rules of PyTorch's own kernels, one row each, and the arguments they get; their results need a GPU."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from fiddlehead.attention import AttentionSpec, Packages, Target, attend
from fiddlehead.attention.backends import cudnn, sdpa_efficient, sdpa_flash
from fiddlehead.attention.backends.backend import Extras
from tests.attention.definition import Call
from tests.attention.graphs import Graphs

BASE: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_query_groups": 8,
}
MODULES = {"cudnn": cudnn, "sdpa_flash": sdpa_flash, "sdpa_efficient": sdpa_efficient}


def target(sm: int, version: str | None = "9.19.0") -> Target:
    return Target("cuda", f"sm{sm}", divmod(sm, 10), Packages(torch="2.11.0", cudnn=version))


CPU = Target("cpu", "cpu", packages=Packages(torch="2.11.0", cudnn=None))
H100 = target(90)
RULES: list[tuple[str, dict[str, Any], Target, str | None]] = [
    ("cudnn", {}, H100, None),
    ("cudnn", {}, target(80), None),
    ("cudnn", {"padding_mask": True}, H100, None),
    ("cudnn", {"dropout": 0.125}, H100, None),
    ("cudnn", {"deterministic": True, "training": False}, H100, None),
    ("cudnn", {"causal": False, "same_length": False}, H100, None),
    ("cudnn", {}, CPU, "needs an NVIDIA GPU, not cpu"),
    ("cudnn", {}, target(75), "sm75: made for sm80 to sm121"),
    ("cudnn", {}, target(90, None), "without cuDNN"),
    ("cudnn", {}, target(90, "8.9.7"), "cuDNN 8.9.7: needs 9"),
    ("cudnn", {"dtype": torch.float32}, H100, "float32: only float16 and bfloat16"),
    ("cudnn", {"head_dim": 100}, H100, "head_dim=100: only multiples of 8"),
    ("cudnn", {"head_dim": 256}, H100, "head_dim=256: at most 128"),
    ("cudnn", {"softcap": 30.0}, H100, "softcap"),
    ("cudnn", {"alibi": True}, H100, "alibi"),
    ("cudnn", {"sinks": True}, H100, "sinks"),
    ("cudnn", {"window_size": (1023, 0)}, H100, "window"),
    ("cudnn", {"packed": True}, H100, "packed"),
    ("cudnn", {"cached": True}, H100, "cache"),
    ("cudnn", {"same_length": False}, H100, "top-left"),
    ("cudnn", {"deterministic": True}, H100, "deterministic"),
    ("cudnn", {"dropout": 0.1}, H100, None),
    ("cudnn", {"dropout": 0.125}, target(90, "9.12.0"), "dropout: cuDNN 9.12.0"),
    ("cudnn", {"dropout": 0.125}, target(90, "9.14.0"), None),
    ("sdpa_flash", {}, H100, None),
    ("sdpa_flash", {"packed": True, "window_size": (1023, 0), "dropout": 0.1}, target(80), None),
    ("sdpa_flash", {"cached": True, "training": False, "same_length": False}, H100, None),
    ("sdpa_flash", {"head_dim": 256}, target(86), None),
    ("sdpa_flash", {"head_dim": 224, "training": False}, target(89), None),
    ("sdpa_flash", {"head_dim": 224}, target(90), None),
    ("sdpa_flash", {}, target(75), "sm75"),
    ("sdpa_flash", {"dtype": torch.float32}, H100, "float32"),
    ("sdpa_flash", {"head_dim": 100}, H100, "multiples of 8"),
    ("sdpa_flash", {"head_dim": 264}, H100, "head_dim=264: at most 256"),
    ("sdpa_flash", {"head_dim": 224}, target(86), "no gradients on sm86"),
    ("sdpa_flash", {"head_dim": 256, "dropout": 0.1}, target(120), "no gradients on sm120"),
    ("sdpa_flash", {"softcap": 30.0}, H100, "softcap"),
    ("sdpa_flash", {"alibi": True}, H100, "alibi"),
    ("sdpa_flash", {"sinks": True}, H100, "sinks"),
    ("sdpa_flash", {"padding_mask": True}, H100, "pack the sequences"),
    ("sdpa_flash", {"cached": True, "page_size": 256, "training": False}, H100, "page table"),
    ("sdpa_flash", {"cached": True}, H100, "cache: has no gradients"),
    ("sdpa_flash", {"deterministic": True}, H100, "use_deterministic_algorithms"),
    ("sdpa_flash", {"deterministic": True, "training": False}, H100, None),
    ("sdpa_flash", {"dtype": torch.int64}, CPU, "int64"),
    ("sdpa_flash", {"dropout": 0.1}, CPU, "dropout: its CPU kernel has none"),
    ("sdpa_flash", {"softcap": 30.0}, CPU, "softcap"),
    ("sdpa_flash", {"sinks": True}, CPU, "sinks"),
    ("sdpa_efficient", {}, H100, None),
    ("sdpa_efficient", {"window_size": (1023, 0), "deterministic": True, "dropout": 0.1}, H100, None),
    ("sdpa_efficient", {"dtype": torch.float32, "alibi": True, "padding_mask": True, "head_dim": 100}, H100, None),
    ("sdpa_efficient", {"dtype": torch.float16, "packed": True, "head_dim": 512}, target(70), None),
    ("sdpa_efficient", {"dtype": torch.float32, "head_dim": 33}, target(75), None),
    ("sdpa_efficient", {}, CPU, "needs an NVIDIA GPU"),
    ("sdpa_efficient", {}, target(130), "sm130"),
    ("sdpa_efficient", {}, target(75), "bfloat16 on sm75: only float16, float32"),
    ("sdpa_efficient", {"dtype": torch.float64}, H100, "float64"),
    ("sdpa_efficient", {"head_dim": 100}, H100, "only multiples of 8"),
    ("sdpa_efficient", {"dtype": torch.float32, "head_dim": 33}, H100, "only multiples of 4"),
    ("sdpa_efficient", {"softcap": 30.0}, H100, "softcap"),
    ("sdpa_efficient", {"sinks": True}, H100, "sinks"),
    ("sdpa_efficient", {"window_size": (9, 0), "same_length": False}, H100, "as many queries as keys"),
    ("sdpa_efficient", {"alibi": True}, H100, "alibi: only in float32"),
    ("sdpa_efficient", {"window_size": (5, 5), "causal": False}, H100, "window: only with a causal mask"),
    ("sdpa_efficient", {"cached": True}, H100, "cache"),
    ("sdpa_efficient", {"packed": True, "padding_mask": True}, H100, "not with a padding mask"),
]


@pytest.mark.parametrize(
    ("name", "changed", "where", "reason"),
    RULES,
    ids=[f"{name}-{where.name}-{changed}" for name, changed, where, _ in RULES],
)
def test_each_rule(name: str, changed: dict[str, Any], where: Target, reason: str | None) -> None:
    found = MODULES[name].why_not(AttentionSpec(**BASE | changed), where)
    assert found == reason if reason is None else reason in (found or "")


def test_deterministic_gradients_are_sdpa_flashs_under_pytorchs_own_flag() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert sdpa_flash.why_not(AttentionSpec(**BASE, deterministic=True), H100) is None
    finally:
        torch.use_deterministic_algorithms(False)


def inputs_of(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Meta tensors of these shapes that get gradients."""
    return [torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


BORDERS = torch.zeros(3, dtype=torch.int32, device="meta")
PACKED = Extras(BORDERS, BORDERS, 16, 16)
PADDED = Extras(padding_mask=torch.ones(2, 16, dtype=torch.bool, device="meta"))
TRACED: list[tuple[ModuleType, dict[str, Any], Extras]] = [
    (cudnn, {}, Extras()),
    (cudnn, {"padding_mask": True}, PADDED),
    (sdpa_flash, {"window_size": (4, 0), "dropout": 0.1}, Extras()),
    (sdpa_flash, {"packed": True}, PACKED),
    (sdpa_efficient, {"window_size": (4, 0)}, Extras()),
    (sdpa_efficient, {"packed": True}, PACKED),
    (sdpa_efficient, {"padding_mask": True}, PADDED),
]


@pytest.mark.parametrize(("module", "features", "extras"), TRACED, ids=lambda x: getattr(x, "__name__", ""))
def test_compiled_each_pass_is_one_node(module: ModuleType, features: dict[str, Any], extras: Extras) -> None:
    """Traced on meta tensors, which need no GPU: the operators' shapes fit together, in both passes."""
    graphs = Graphs()
    packed = features.get("packed", False)
    inputs = (
        inputs_of((32, 8, 64), (32, 2, 64), (32, 2, 64)) if packed else inputs_of((2, 16, 8, 64), *[(2, 16, 2, 64)] * 2)
    )
    small: dict[str, Any] = {"head_dim": 64, "num_attention_heads": 8, "num_query_groups": 2}
    spec = AttentionSpec(**BASE | small | features)
    compiled = torch.compile(
        lambda q, k, v: module.run(q, k, v, spec, 0.1, extras), fullgraph=True, backend=graphs.backend
    )
    out = compiled(*inputs)
    assert out.shape == inputs[0].shape
    for x, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert gradient.shape == x.shape
    assert [len(names) for names in graphs.attention()] == [1, 1]


def stand_in(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, sees: torch.Tensor, scale: float
) -> torch.Tensor:
    """What the kernels compute of q (B, H, T, D), k and v (B, G, S, D), where `sees` (T, S)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * scale + (0.0 if bias is None else bias)
    return scores.masked_fill(~sees, -math.inf).softmax(dim=-1) @ v


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes with the operators' conventions on a CPU, where they have no kernels."""

    def efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, mask_type, window, dropout, scale, training, det):
        (T, H), S = q.shape[1:3], k.shape[1]
        assert k.shape[2] == H
        if bias is not None:
            bias = sdpa_efficient._laid_out(bias, q, k)
            assert bias is not None and bias.shape == (q.shape[0], H, T, S)
            assert all(stride % 16 == 0 for stride in bias.stride()[:-1])
        distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
        sees = torch.ones_like(distance, dtype=torch.bool)
        if mask_type == 2:
            sees = distance >= 0
        if window:
            sees = sees & (distance < window)
        out = stand_in(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, sees, scale)
        nothing = torch.zeros(())
        return out.transpose(1, 2).contiguous(), nothing, nothing.long(), nothing.long()

    def of_cudnn(q, k, v, bias, training, dropout=0.0, causal=False, debug=False, *, scale=1.0):
        T, S = q.shape[2], k.shape[2]
        assert S > 1 and not (causal and (T != S or bias is not None))
        sees = torch.ones(T, S, dtype=torch.bool)
        out = stand_in(q, k, v, bias, sees.tril() if causal else sees, scale)
        return out, *[torch.zeros(())] * 3, T, S, *[torch.zeros(())] * 3

    monkeypatch.setattr(sdpa_efficient, "forward", efficient)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", of_cudnn)


WIRED = [
    (sdpa_efficient, Call()),
    (sdpa_efficient, Call(window_size=(2, 0))),
    (sdpa_efficient, Call(causal=False, padding=True, T=8)),
    (sdpa_efficient, Call(padding=True, alibi=True, B=3, S=18, seed=2)),
    (sdpa_efficient, Call(padding=True, window_size=(1, 0), B=4)),
    (cudnn, Call(T=7)),
    (cudnn, Call(causal=False)),
    (cudnn, Call(T=7, padding=True, B=4)),
    (cudnn, Call(T=7, causal=False, padding=True, B=4, S=2)),
    (cudnn, Call(T=3, S=1, causal=False)),
    (cudnn, Call(T=3, S=1, causal=False, padding=True, B=4)),
]


@pytest.mark.parametrize(("module", "call"), WIRED, ids=str)
def test_masks_and_layouts_reach_the_kernel_as_it_takes_them(stand_ins: None, module: ModuleType, call: Call) -> None:
    q, k, v = call.inputs(torch.float32)
    arguments = call.arguments()
    spec = AttentionSpec(
        dtype=q.dtype,
        head_dim=call.D,
        num_attention_heads=call.G * call.R,
        num_query_groups=call.G,
        causal=call.causal,
        window_size=call.window_size,
        alibi=call.alibi,
        padding_mask=call.padding,
        same_length=call.T == call.S,
        training=False,
    )
    extras = Extras(padding_mask=arguments["padding_mask"], alibi_slopes=arguments["alibi_slopes"])
    found = module.run(q, k, v, spec, call.D**-0.5, extras)
    torch.testing.assert_close(found, attend(q, k, v, **arguments, backend="reference"))
