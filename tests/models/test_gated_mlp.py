"""The feed-forward with SwiGLU inside its products. The kernels are stand-ins on a CPU: their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fiddlehead.attention import Package, Target
from fiddlehead.models import TransformerConfig, gated_mlp
from fiddlehead.models.collectives import Group
from fiddlehead.models.gated_mlp import gated_mlp as fused
from fiddlehead.models.gated_mlp import small_errors, why_not
from fiddlehead.models.speed import checkpointed
from tests.models import file_peers
from tests.training.ranks import on_ranks

HOPPER, AMPERE = Target.gpu("h100"), Target.gpu("a100")
CONFIG: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}


def given(results: tuple[torch.Tensor, torch.Tensor], outs: Sequence[torch.Tensor]) -> Any:
    """The results, or `outs` with them."""
    return tuple(out.copy_(result) for out, result in zip(outs, results, strict=True)) if outs else results


def defined_product(x: torch.Tensor, w1: torch.Tensor, outs: Sequence[torch.Tensor] = ()) -> Any:
    """What quack's first product gives."""
    with torch.autocast(x.device.type, enabled=False):  # it is still on where an operator computes
        gate, up = (x.float() @ w1.float().T).chunk(2, dim=-1)
    before = torch.stack([gate, up], dim=-1).flatten(1)
    return given((before.to(x.dtype), (F.silu(gate) * up).to(x.dtype)), outs)


def defined_gradient(
    dy: torch.Tensor, w2: torch.Tensor, before: torch.Tensor, outs: Sequence[torch.Tensor] = ()
) -> Any:
    """What quack's product with the output's gradient gives."""
    with torch.autocast(dy.device.type, enabled=False):
        gate, up, d = before[:, ::2].float(), before[:, 1::2].float(), dy.float() @ w2.float()
    s = gate.sigmoid()
    dbefore = torch.stack([d * up * s * (1 + gate * (1 - s)), d * gate * s], dim=-1).flatten(1)
    return given((dbefore.to(dy.dtype), (gate * s * up).to(dy.dtype)), outs)


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions in the place of quack's kernels."""
    monkeypatch.setattr(gated_mlp, "_product", defined_product)
    monkeypatch.setattr(gated_mlp, "_gradient", defined_gradient)


def plain(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, w1).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2)


def tensors(*rows: int, C: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    drawn = torch.randn(*rows, C), torch.randn(2 * width, C) / C**0.5, torch.randn(C, width) / width**0.5
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def results(compute: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    y = compute(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, drawn_like(y))]


def drawn_like(y: torch.Tensor) -> torch.Tensor:
    """Numbers in the shape of y, not contiguous."""
    return torch.randn(y.mT.shape, generator=torch.Generator().manual_seed(1)).mT.to(y)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def shared(rows: tuple[int, int], C: int, width: int, dtype: torch.dtype, folder: Path | None) -> list[list[Any]]:
    """This rank's part of the output, and of the gradients of x, w1 and w2."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    group = replace(Group.of(mesh, "tp"), copies=folder is not None)
    if folder is not None:
        file_peers.connect(mesh, folder)
    rank, n = dist.get_rank(), dist.get_world_size()
    x, w1, w2 = tensors(*rows, C=C, width=width, dtype=dtype)
    own_w1 = torch.cat([part.chunk(n)[rank] for part in w1.detach().chunk(2)])
    parts = x.detach().chunk(n, dim=1)[rank], own_w1, w2.detach().chunk(n, dim=1)[rank]
    dy = drawn_like(x).chunk(n, dim=1)[rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_mlp, "_product", defined_product)
        patch.setattr(gated_mlp, "_gradient", defined_gradient)
        inputs = [part.contiguous().requires_grad_() for part in parts]
        y = fused(*inputs, group)
        return [result.tolist() for result in (y.detach(), *torch.autograd.grad(y, inputs, dy))]


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processes_that_share_its_width_compute_their_parts_of_it(
    dtype: torch.dtype, copies: bool, tmp_path: Path
) -> None:
    rows, C, width, n = (3, 10), 24, 56, 2
    of_ranks = zip(*on_ranks(n, shared, rows, C, width, dtype, tmp_path if copies else None), strict=True)
    parts = [[torch.tensor(part) for part in each] for each in of_ranks]
    x, w1, w2 = (t.detach().double().requires_grad_() for t in tensors(*rows, C=C, width=width, dtype=dtype))
    y = plain(x, w1, w2)
    expected = [y.detach(), *torch.autograd.grad(y, (x, w1, w2), drawn_like(x))]
    gates, ups = zip(*(part.chunk(2) for part in parts[2]), strict=True)
    whole = [torch.cat(parts[0], dim=1), torch.cat(parts[1], dim=1), torch.cat([*gates, *ups]), torch.cat(parts[3], 1)]
    for got, right in zip(whole, expected, strict=True):
        assert got.shape == right.shape
        assert error(got, right) < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize(("rows", "C", "width"), [((1,), 8, 8), ((3, 5), 24, 56), ((2, 1, 7), 72, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_the_feed_forward_s(
    definitions: None, rows: tuple[int, ...], C: int, width: int, dtype: torch.dtype
) -> None:
    inputs = tensors(*rows, C=C, width=width, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = results(fused, inputs), results(plain, exact)
    for got, right, like in zip(found, expected, [inputs[0], *inputs], strict=True):
        assert got.shape == right.shape
        assert got.dtype == like.dtype
        assert error(got, right) < (1e-6 if dtype == torch.float32 else 6e-3)


def test_in_mixed_precision_the_gradients_have_their_weights_dtype(definitions: None) -> None:
    inputs = tensors(2, 9, C=24, width=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(fused, inputs)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, *[torch.float32] * 3]
    expected = results(plain, [tensor.detach().double().requires_grad_() for tensor in inputs])
    assert max(map(error, found, expected)) < 6e-3


def test_frozen_weights_get_no_gradient(definitions: None) -> None:
    x, w1, w2 = tensors(4, C=16, width=24, dtype=torch.float32)
    (dx,) = torch.autograd.grad(fused(x, w1.detach(), w2.detach()).sum(), [x])
    (right,) = torch.autograd.grad(plain(x, w1.detach(), w2.detach()).sum(), [x])
    torch.testing.assert_close(dx, right)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_compiled_it_is_the_same_and_keeps_no_copy_of_weights(definitions: None, again: bool) -> None:
    inputs = tensors(6, 4, C=16, width=40, dtype=torch.bfloat16)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    compute = checkpointed(fused, {}) if again else fused
    eager = results(fused, inputs)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compiled = results(torch.compile(compute, fullgraph=True), inputs)
    for got, right in zip(compiled, eager, strict=True):
        assert torch.equal(got, right)
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    before = 24 * 80 * 2  # what the first product gave
    assert sum(size for pointer, size in kept.items() if pointer not in given) == (0 if again else before)


def test_compiled_the_second_product_is_not_computed_again(definitions: None) -> None:
    inputs = tensors(6, 4, C=16, width=40, dtype=torch.bfloat16)

    def compute(*inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(fused, *inputs, use_reentrant=False)

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager_decomp_partition")
    with Products() as forward:  # not compiled, because the compiler does not work in such a block
        compute(*inputs)
    y = compiled(*inputs)
    with Products() as backward:
        torch.autograd.grad(y, inputs, drawn_like(y))
    assert forward.shapes == [(24, 16)]  # those of operators are not seen
    assert sorted(backward.shapes) == [(16, 40), (80, 16)]  # the gradients of w2 and w1


class Products(TorchDispatchMode):
    """Notes the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("changes", "dtype", "target", "words"),
    [
        ({}, torch.bfloat16, AMPERE, "needs a Hopper GPU, not a100"),
        ({}, torch.bfloat16, Target("cpu", "cpu"), "not cpu"),
        ({"num_moe_experts": 4}, torch.bfloat16, HOPPER, "num_moe_experts"),
        ({"activation": "geglu"}, torch.bfloat16, HOPPER, "activation='geglu': only 'swiglu'"),
        ({"add_bias_linear": True}, torch.bfloat16, HOPPER, "biases"),
        ({}, torch.float32, HOPPER, "float32: only bfloat16"),
        ({"ffn_hidden_size": 100}, torch.bfloat16, HOPPER, "ffn_hidden_size=100: only multiples of 8"),
        (
            {"hidden_size": 60, "num_attention_heads": 2, "ffn_hidden_size": 64},
            torch.bfloat16,
            HOPPER,
            "hidden_size=60: only multiples of 8",
        ),
    ],
)
def test_why_not_says_what_quack_lacks(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], dtype: torch.dtype, target: Target, words: str
) -> None:
    monkeypatch.setattr(gated_mlp, "installed", lambda: Package(gated_mlp.OLDEST))
    assert why_not(TransformerConfig(**CONFIG), torch.bfloat16, HOPPER) is None
    assert words in str(why_not(TransformerConfig(**(CONFIG | changes)), dtype, target))


@pytest.mark.parametrize(
    ("package", "words"),
    [(Package(), "quack-kernels is not installed"), (Package("0.5.3"), "0.5.3 is installed but too old: at least")],
)
def test_a_package_that_is_missing_or_old_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, package: Package, words: str
) -> None:
    monkeypatch.setattr(gated_mlp, "installed", lambda: package)
    monkeypatch.setattr(gated_mlp, "small_errors", lambda device: pytest.fail("it was tried"))
    gated_mlp.tried.cache_clear()
    assert words in str(why_not(TransformerConfig(**CONFIG), torch.bfloat16, HOPPER, probe=True))
    gated_mlp.tried.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "words"), [("broken", "its products fail: TypeError: no key"), ("wrong", "are wrong here: dx by")]
)
def test_kernels_that_fail_or_are_wrong_here_are_not_taken(
    definitions: None, monkeypatch: pytest.MonkeyPatch, kernel: str, words: str
) -> None:
    def broken(*arguments: Any) -> Any:
        raise TypeError("no key\nand more")

    def wrong(dy: torch.Tensor, w2: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dbefore, activated = defined_gradient(dy, w2, before)
        return dbefore * torch.nan, activated

    monkeypatch.setattr(gated_mlp, "_gradient", broken if kernel == "broken" else wrong)
    monkeypatch.setattr(gated_mlp, "installed", lambda: Package(gated_mlp.OLDEST))
    monkeypatch.setattr(gated_mlp, "small_errors", lambda device: small_errors(torch.device("cpu")))
    gated_mlp.tried.cache_clear()
    assert words in str(why_not(TransformerConfig(**CONFIG), torch.bfloat16, HOPPER, probe=True))
    gated_mlp.tried.cache_clear()


def test_the_trial_does_not_depend_on_the_default_device_and_dtype(definitions: None) -> None:
    expected = small_errors(torch.device("cpu"))
    assert max(expected.values()) < 6e-3
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.no_grad():
            assert small_errors(torch.device("cpu")) == expected
    finally:
        torch.set_default_dtype(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("N", "C", "width"), [(1, 64, 24), (7, 2560, 6912), (777, 576, 1536), (4097, 1024, 2816)])
def test_on_a_gpu_quack_is_as_near_to_float64_as_pytorch(N: int, C: int, width: int) -> None:
    if reason := why_not(TransformerConfig(**CONFIG), torch.bfloat16, Target.of(torch.device("cuda")), probe=True):
        pytest.skip(reason)
    inputs = [tensor.detach().cuda().requires_grad_() for tensor in tensors(N, C=C, width=width, dtype=torch.bfloat16)]
    exact = results(plain, [tensor.detach().double().requires_grad_() for tensor in inputs])
    found, again, pytorch = results(fused, inputs), results(fused, inputs), results(plain, inputs)
    for got, same, other, right in zip(found, again, pytorch, exact, strict=True):
        assert torch.equal(got, same)
        assert error(got, right) < 1.5 * error(other, right)
