"""The gradient of a weight that the embedding and the output layer share, against float64 and PyTorch's own."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models import tied_embedding as module
from fiddlehead.models.linear_cross_entropy import linear_cross_entropy
from fiddlehead.models.speed import compile_transformer, recompute_activations
from fiddlehead.models.tied_embedding import add_rows_, tied_embedding

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 40,
    "vocab_size": 53,
    "seq_length": 19,
    "share_embeddings_and_output_weights": True,
}
CAPPED = {"final_logit_softcapping": 4.0, "logits_scaling": 2.0, "embedding_multiplier": 3.0}


def ids_of(kind: str, N: int, V: int) -> torch.Tensor:
    torch.manual_seed(N + V)
    ids = torch.randint(V, (N,))
    if kind == "frequent":
        ids[torch.rand(N) < 0.9] = V // 2
    return torch.full_like(ids, V - 1) if kind == "one" else ids


@pytest.mark.parametrize("kind", ["uniform", "frequent", "one"])
@pytest.mark.parametrize(("N", "V", "C"), [(1, 1, 1), (33, 7, 3), (3000, 500, 5), (40, 900, 13)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_summed_wide_and_added_with_one_rounding(
    dtype: torch.dtype, N: int, V: int, C: int, kind: str
) -> None:
    ids = ids_of(kind, N, V)
    rows, total = (torch.randn(size, C).to(dtype) for size in (N, V))
    exact = total.double().index_add(0, ids, rows.double())
    found = add_rows_(total.clone(), ids, rows)
    sizes = total.double().abs().index_add(0, ids, rows.double().abs())  # of what is added up
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() if dtype == torch.bfloat16 else 0
    close = 1e-13 if dtype == torch.float64 else 1e-5
    assert ((found.double() - exact).abs() <= rounding + close * sizes).all()
    assert torch.equal(add_rows_(total.clone(), ids, rows), found)


def test_no_rows_change_nothing() -> None:
    total = torch.randn(5, 4)
    assert torch.equal(add_rows_(total.clone(), torch.zeros(0, dtype=torch.int64), total[:0]), total)


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    torch.manual_seed(1)
    return Transformer(TransformerConfig(**SHAPE | changes)).to(dtype)


def batches(number: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels; nine of ten tokens are one, and some have no label."""
    torch.manual_seed(2)
    made = []
    for _ in range(number):
        ids = ids_of("frequent", 3 * 19, 53).view(3, 19)
        labels = torch.randint(53, (3, 19))
        labels[:, ::4] = -100
        made.append((ids, labels))
    return made


def gradients(model: Transformer, number: int = 1, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Of the mean of some micro-batches."""
    model.zero_grad()
    for ids, labels in batches(number):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=labels, divisor=number * 42)
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain(model: Transformer) -> Transformer:
    """The same with the gradient that PyTorch adds up."""
    model.joins_gradients = False
    return model


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("changes", [{}, CAPPED, {"share_embeddings_and_output_weights": False}])
@pytest.mark.parametrize(
    ("dtype", "autocast", "close"),
    [
        (torch.float64, False, 1e-12),
        (torch.float32, False, 2e-6),
        (torch.float32, True, 4e-2),
        (torch.bfloat16, False, 4e-2),
    ],
)
def test_a_model_has_the_gradients_that_pytorch_finds(
    dtype: torch.dtype, autocast: bool, close: float, changes: dict[str, Any], number: int
) -> None:
    found, again = (gradients(model_of(dtype, **changes), number, autocast) for _ in range(2))
    exact = gradients(plain(model_of(dtype, **changes)).double(), number)
    theirs = gradients(plain(model_of(dtype, **changes)), number, autocast)
    assert found.keys() == exact.keys()
    assert torch.equal(found["embedding.weight"], again["embedding.weight"])
    for name, gradient in exact.items():
        errors = [float((each[name].double() - gradient).norm() / gradient.norm()) for each in (found, theirs)]
        assert found[name].dtype == dtype
        assert errors[0] <= max(1.05 * errors[1], 1e-14) and errors[0] < close, name


def test_the_backward_pass_adds_to_the_gradient_that_the_loss_left() -> None:
    model = model_of()
    ((ids, labels),) = batches()
    loss, made = model(ids, labels=labels, divisor=42), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (53, 24):
                made.append(str(func))
            return result

    with Watch():
        loss.backward()
    assert made == ["aten.index_add_.default", "aten.detach.default"]  # the second does not copy


@pytest.mark.parametrize("used", ["both", "rows", "output", "output first", "two losses", "rows twice"])
def test_no_gradient_is_lost_whatever_is_used(used: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(31, 6, dtype=torch.float64)
    ids, labels = ids_of("frequent", 20, 31), torch.randint(31, (20,))

    def found(lookup: Any) -> torch.Tensor:
        weight = start.clone().requires_grad_()
        rows, output = lookup(weight)
        hidden = rows.tanh() if used != "output" else start[:20]
        loss: Any = 0
        if used in ("both", "two losses", "rows twice"):
            loss = linear_cross_entropy(hidden, output, labels)
        if used in ("rows", "rows twice"):
            loss = loss + hidden.square().sum() + (weight**3).sum()
        if used in ("output", "output first"):
            loss = linear_cross_entropy(start[:20], output, labels)
        if used == "two losses":
            loss = loss + 2 * linear_cross_entropy(hidden.sin(), output, labels.flip(0))
        if used == "output first":
            loss.backward()
            loss = hidden.square().sum()
        loss.backward()
        assert weight.grad is not None
        return weight.grad

    def by_pytorch(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nn.functional.embedding(ids, weight), weight

    if used == "output first":  # a graph that was freed is an error and no wrong gradient
        with pytest.raises(RuntimeError, match="a second time"):
            found(lambda weight: tied_embedding(weight, ids))
        return
    torch.testing.assert_close(found(lambda weight: tied_embedding(weight, ids)), found(by_pytorch))


def test_gradients_of_other_tensors_leave_out_the_weight() -> None:
    model = model_of(torch.float64)
    ((ids, labels),) = batches()
    others = [parameter for name, parameter in model.named_parameters() if name != "embedding.weight"]
    found = torch.autograd.grad(model(ids, labels=labels), others)
    torch.testing.assert_close(found, torch.autograd.grad(plain(model)(ids, labels=labels), others))
    assert model.embedding.weight.grad is None


def test_several_forward_passes_may_come_before_their_backward_passes() -> None:
    model = model_of(torch.float64)
    losses = [model(ids, labels=labels) for ids, labels in batches(3)]
    (losses[2] + 2 * losses[0]).backward()
    losses[1].backward()
    other = plain(model_of(torch.float64))
    first, second, third = (other(ids, labels=labels) for ids, labels in batches(3))
    (third + 2 * first + second).backward()
    torch.testing.assert_close(model.embedding.weight.grad, other.embedding.weight.grad)


def test_a_second_backward_pass_is_refused() -> None:
    """The gradient that the loss left has the embedding's rows in it."""
    ((ids, labels),) = batches()
    loss = model_of()(ids, labels=labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_frozen_weight_has_no_gradient() -> None:
    model = model_of()
    model.embedding.requires_grad_(False)
    found = gradients(model)
    assert "embedding.weight" not in found and len(found) > 1
    with torch.no_grad():
        ((ids, labels),) = batches()
        assert not model_of()(ids, labels=labels).requires_grad


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_layers_may_be_computed_again(recompute: Any) -> None:
    model = model_of(torch.float64)
    recompute_activations(model, recompute)
    torch.testing.assert_close(gradients(model), gradients(plain(model_of(torch.float64))))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.parametrize("compile", ["layers", "model"])
def test_a_compiled_model_has_the_same_gradients(compile: Any) -> None:
    model = model_of()
    compile_transformer(model, compile)
    assert model.joins_gradients == (compile == "layers")
    torch.testing.assert_close(gradients(model), gradients(plain(model_of())), rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_the_rows_are_freed_before_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked_up = model_of(), []
    forward = module._TiedEmbedding.apply

    def noted(*given: Any) -> Any:
        rows, weight = forward(*given)
        looked_up.append(weakref.ref(rows))
        return rows, weight

    layers = model.run_layers

    def run_layers(*given: Any, **more: Any) -> torch.Tensor:
        assert [rows() for rows in looked_up] == [None]
        return layers(*given, **more)

    monkeypatch.setattr(module._TiedEmbedding, "apply", noted)
    monkeypatch.setattr(model, "run_layers", run_layers)
    ids = torch.randint(53, (2, 19))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids, labels=ids).requires_grad


def test_hooks_of_the_embedding_are_called() -> None:
    model, ids, calls = model_of(), torch.randint(53, (2, 19)), []
    model.embedding.register_forward_hook(lambda *given: calls.append(given))
    model(ids, labels=ids).backward()
    assert len(calls) == 1
