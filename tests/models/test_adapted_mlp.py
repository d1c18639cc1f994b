"""The feed-forward with SwiGLU and adapters in kernels; on a CPU PyTorch computes what the kernels do.

pytest -m gpu tests/models/test_adapted_mlp.py
TRITON_INTERPRET=1 pytest tests/models/test_adapted_mlp.py     without a GPU, where Triton is installed
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddlehead.attention import Package, Target
from fiddlehead.models import LoRA, Transformer, TransformerConfig, adapted_mlp, mlp_choice, nf4
from fiddlehead.models.adapted_mlp import why_not
from fiddlehead.models.lora import without_adapters
from fiddlehead.models.speed import checkpointed, fuse_mlp
from tests.triton_kernels import DEVICE, NEEDS_KERNELS

HOPPER, AMPERE = Target.gpu("h100"), Target.gpu("a100")
CONFIG: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
NAMES = ["x", "w1", "a1", "b1", "w2", "a2", "b2"]


def drawn(
    *rows: int, C: int, width: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = [
        torch.randn(*rows, C),
        torch.randn(2 * width, C) / C**0.5,
        torch.randn(rank, C) / C**0.5,
        torch.randn(2 * width, rank) / rank**0.5,
        torch.randn(C, width) / width**0.5,
        torch.randn(rank, width) / width**0.5,
        torch.randn(C, rank) / rank**0.5,
    ]
    return {name: tensor.to(device, dtype) for name, tensor in zip(NAMES, made, strict=True)}


def plain(x: Tensor, w1: Tensor, a1: Tensor, b1: Tensor, w2: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    gate, up = (F.linear(x, w1) + F.linear(F.linear(x, a1), b1)).chunk(2, dim=-1)
    y = F.silu(gate) * up
    return F.linear(y, w2) + F.linear(F.linear(y, a2), b2)


def results(compute: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradients of all but the weights."""
    given = {name: value.detach().clone() for name, value in inputs.items()}
    learned = [given[name].requires_grad_() for name in NAMES if name[0] != "w"]
    y = compute(*given.values())
    dy = torch.randn(y.mT.shape, generator=torch.Generator().manual_seed(1)).mT.to(y)  # not contiguous
    return [y.detach(), *torch.autograd.grad(y, learned, dy)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


@pytest.mark.parametrize("how", ["", "compiled", "compiled and computed again"])
@pytest.mark.parametrize(
    ("rows", "C", "width", "rank", "dtype"),
    [
        ((1,), 3, 2, 1, torch.float64),
        ((2, 1, 7), 24, 56, 5, torch.float64),
        ((2, 1, 7), 24, 56, 5, torch.bfloat16),
    ],
)
def test_it_and_its_gradients_are_those_of_its_parts(
    rows: tuple[int, ...], C: int, width: int, rank: int, dtype: torch.dtype, how: str
) -> None:
    torch.compiler.reset()
    inputs = drawn(*rows, C=C, width=width, rank=rank, dtype=dtype)
    compute: Any = adapted_mlp.adapted_mlp
    compute = checkpointed(compute, {}) if how.endswith("again") else compute
    found = results(torch.compile(compute, fullgraph=True) if how else compute, inputs)
    for mine, right in zip(found, results(plain, double(inputs)), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        assert error(mine, right) < (6e-3 if dtype == torch.bfloat16 else 1e-14)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_model_with_it_learns_what_it_learns_without(quantize: Any) -> None:
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for fused, mixed in ((False, False), (False, True), (True, True)):
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(**CONFIG))
        if quantize:
            nf4.quantize_layers(model)
        LoRA(rank=3, quantize_base=quantize).apply(model)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.data.normal_()
        if fused:
            fuse_mlp(model, "triton")
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(ids)
        logits.float().square().mean().backward()
        learned = [p.grad for p in model.parameters() if p.grad is not None]
        assert {gradient.dtype for gradient in learned} == {torch.float32}
        found.append((logits.detach(), torch.cat([gradient.flatten() for gradient in learned])))
    for exact, other, mine in zip(*found, strict=True):
        assert not torch.equal(mine, other), "the same rounding, so perhaps the same operations"
        assert error(mine, exact.double()) < 1.3 * error(other, exact.double())


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_round_as_no_adapters(dora: bool) -> None:
    """So preferences are learned from a loss of log 2."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**CONFIG))
    LoRA(rank=3, dora=dora).apply(model)
    if not dora:
        fuse_mlp(model, "triton")
    ids = torch.randint(100, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
        assert not torch.equal(model(ids), expected)
        with without_adapters(model):
            assert torch.equal(model(ids), expected)


def test_a_layer_keeps_the_first_product_and_not_the_activations() -> None:
    inputs = drawn(40, C=24, width=64, rank=4, dtype=torch.bfloat16)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = {name: value.requires_grad_(name[0] != "w") for name, value in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted_mlp.adapted_mlp(*given.values())
    pointers = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    assert sum(size for pointer, size in kept.items() if pointer not in pointers) == 2 * 40 * (2 * 64 + 2 * 4)


@pytest.mark.parametrize(
    ("changes", "lora", "dtype", "target", "tensor", "words"),
    [
        ({}, {}, torch.bfloat16, AMPERE, 1, "needs a Hopper GPU, not a100"),
        ({"activation": "geglu"}, {}, torch.bfloat16, HOPPER, 1, "activation='geglu': only 'swiglu'"),
        ({"add_bias_linear": True}, {}, torch.bfloat16, HOPPER, 1, "biases"),
        ({}, {}, torch.float32, HOPPER, 1, "float32: only bfloat16"),
        ({}, {}, torch.bfloat16, HOPPER, 2, "tensor_parallel=2"),
        ({}, {"dora": True}, torch.bfloat16, HOPPER, 1, "lora.dora=True"),
        ({}, {"dropout": 0.1}, torch.bfloat16, HOPPER, 1, "lora.dropout=0.1: only 0"),
        ({}, {"rank": 65}, torch.bfloat16, HOPPER, 1, "lora.rank=65: at most 64"),
        ({}, {"target_modules": ["linear_qkv"]}, torch.bfloat16, HOPPER, 1, "layers.0.mlp.linear_fc1 has no adapter"),
        (
            {},
            {"target_modules": ["linear_fc?", "layers.1.*"]},
            torch.bfloat16,
            HOPPER,
            1,
            None,
        ),
        (
            {},
            {"target_modules": ["linear_fc1", "layers.0.mlp.*"]},
            torch.bfloat16,
            HOPPER,
            1,
            "layers.1.mlp.linear_fc2 has no",
        ),
    ],
)
def test_why_not_says_what_the_kernels_lack(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    lora: dict[str, Any],
    dtype: torch.dtype,
    target: Target,
    tensor: int,
    words: str | None,
) -> None:
    monkeypatch.setattr(adapted_mlp, "installed", lambda: Package("3.6.0"))
    reason = why_not(TransformerConfig(**(CONFIG | changes)), LoRA(**lora), dtype, target, tensor)
    assert reason is None if words is None else words in str(reason)


def test_where_triton_is_missing_or_wrong_it_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = TransformerConfig(**CONFIG), torch.device("cpu")
    monkeypatch.setattr(adapted_mlp, "installed", Package)
    adapted_mlp.tried.cache_clear()
    assert why_not(config, LoRA(), torch.bfloat16, HOPPER, probe=True) == "triton is not installed"
    errors = adapted_mlp.small_errors(cpu)
    assert set(errors) == {"y", "dx", "da1", "db1", "da2", "db2"}
    assert 0 < max(errors.values()) < 8e-3
    for name, wrong in (("db1", float("nan")), ("da2", 0.1)):
        monkeypatch.setattr(adapted_mlp, "installed", lambda: Package("3.6.0"))
        monkeypatch.setattr(adapted_mlp, "small_errors", lambda device, wrong={name: wrong}: errors | wrong)
        adapted_mlp.tried.cache_clear()
        assert f"its products are wrong here: {name} by" in str(
            why_not(config, LoRA(), torch.bfloat16, HOPPER, probe=True)
        )
    adapted_mlp.tried.cache_clear()
    assert mlp_choice.why_not_there(HOPPER) is None


@NEEDS_KERNELS
@pytest.mark.gpu
@pytest.mark.parametrize(("N", "width"), [(1, 3), (63, 64), (100, 130), (333, 200)])
@pytest.mark.parametrize("rank", [1, 16, 24, 64])
def test_the_kernels_compute_what_pytorch_does(N: int, width: int, rank: int) -> None:
    from fiddlehead.models import adapted_swiglu_kernel as kernel
    from fiddlehead.models.adapted_mlp import _activate, _filled, _gradients

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter rounds bfloat16 towards 0
    torch.manual_seed(0)
    shapes = [(N, 2 * width), (N, rank), (2 * width, rank), (rank, width), (N, width), (N, rank)]
    before, z1, b1, a2, d, dz2 = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    padded = _filled(z1, 1), _filled(b1, 1), _filled(a2, 0), _filled(dz2, 1)
    found = [*kernel.activate(before, *padded[:3])]
    found += kernel.gradients(d, before, padded[0], padded[1], padded[3], padded[2])
    assert [tensor.shape[1] for tensor in (found[1], found[3], found[4])] == [padded[0].shape[1]] * 3
    exact = [tensor.double().cpu() for tensor in (before, z1, b1, a2)]
    expected = [*_activate(*exact), *_gradients(d.double().cpu(), *exact[:3], dz2.double().cpu(), exact[3])]
    for got, right in zip(found, expected, strict=True):
        own = got.cpu()[tuple(slice(size) for size in right.shape)]
        assert error(own, right) < (2e-2 if N == 1 else 6e-3 if dtype == torch.bfloat16 else 2e-5)
        assert not got.cpu().float().norm().isnan()
    again = kernel.gradients(d, before, padded[0], padded[1], padded[3], padded[2])
    assert all(torch.equal(one, other) for one, other in zip(found[2:], again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("N", "C", "width", "rank"), [(1, 64, 24, 8), (7, 2560, 6912, 16), (777, 576, 1536, 33), (4097, 1024, 2816, 64)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_is_as_near_to_float64_as_pytorch(N: int, C: int, width: int, rank: int, compiled: bool) -> None:
    torch.compiler.reset()
    inputs = drawn(N, C=C, width=width, rank=rank, dtype=torch.bfloat16, device="cuda")
    compute: Any = torch.compile(adapted_mlp.adapted_mlp) if compiled else adapted_mlp.adapted_mlp
    exact = results(plain, double(inputs))
    found, again, pytorch = results(compute, inputs), results(compute, inputs), results(plain, inputs)
    for got, same, other, right in zip(found, again, pytorch, exact, strict=True):
        assert torch.equal(got, same)
        assert error(got, right) < 1.5 * error(other, right)
