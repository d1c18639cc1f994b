"""Copies of weights in bfloat16 for one forward pass: what is written of their gradients, and what is left of them."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from fiddlehead.models import LoRA, Transformer, TransformerConfig, bfloat16_weights
from fiddlehead.models.bfloat16_weights import in_bfloat16, of_products
from fiddlehead.models.linear import Linear
from fiddlehead.models.moe import GroupedLinear
from fiddlehead.models.speed import compile_transformer

SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "num_query_groups": 1}
SHAPE |= {"ffn_hidden_size": 40, "vocab_size": 31, "seq_length": 16}


def made(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SHAPE | changes))


def of_products_by_kind(transformer: Transformer) -> list[Any]:
    return [module for module in transformer.layers.modules() if isinstance(module, nn.Linear | GroupedLinear)]


def loss(transformer: Transformer) -> torch.Tensor:
    ids = torch.arange(32).view(2, 16) % 31
    with torch.autocast("cpu", torch.bfloat16):
        return transformer(ids, labels=ids.roll(-1)) / 32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_layer_writes_no_float32_gradient_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    written: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()

    def backward(graph: Any, inputs: Any) -> Any:
        (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
        values = [node.meta["val"] for node in results if node is not None]
        written.update((tuple(value.shape), value.dtype) for value in values if isinstance(value, torch.Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=backend, fullgraph=True))
    transformer = made(num_layers=1, add_bias_linear=True)
    compile_transformer(transformer, "layers")
    with in_bfloat16(transformer):
        nats = loss(transformer)
    nats.backward()
    matrices = {shape: dtype for shape, dtype in written if len(shape) == 2}
    shapes = [tuple(module.weight.shape) for module in of_products(transformer)]  # type: ignore[union-attr]
    assert matrices == dict.fromkeys(shapes, torch.bfloat16) and len(shapes) == 4
    assert {dtype for shape, dtype in written if len(shape) == 1} == {torch.float32}  # of norms and biases


@pytest.mark.parametrize("changes", [{}, {"num_moe_experts": 4, "moe_router_topk": 2}])
def test_what_a_product_gives_becomes_the_gradient_without_a_copy(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    given: set[int] = set()

    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        given.add(gradient.data_ptr())
        return gradient, None

    monkeypatch.setattr(bfloat16_weights._InBFloat16, "backward", backward)
    transformer = made(**changes)
    with in_bfloat16(transformer):
        nats = loss(transformer)
    nats.backward()
    assert given == {module.weight.grad.data_ptr() for module in of_products_by_kind(transformer)}


def test_a_later_micro_batch_is_added_in_place_without_a_float32_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.dtype] = []
    backward = bfloat16_weights._InBFloat16.backward

    def noted(ctx: Any, gradient: torch.Tensor) -> Any:
        result = backward(ctx, gradient)
        given.append(result[0].dtype)
        return result

    monkeypatch.setattr(bfloat16_weights._InBFloat16, "backward", noted)
    transformer = made()
    sums: list[list[int]] = []
    for _ in range(3):
        with in_bfloat16(transformer, adds_up=True):
            nats = loss(transformer)
        nats.backward()
        gradients = [module.weight.grad for module in of_products_by_kind(transformer)]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        sums.append([gradient.data_ptr() for gradient in gradients])
    assert given == [torch.float32] * 8 + [torch.bfloat16] * 16
    assert sums[0] == sums[1] == sums[2]


def test_weights_are_themselves_after_the_block_and_copies_are_gone_after_the_backward_pass() -> None:
    transformer = made()
    before = dict(transformer.named_parameters())
    with in_bfloat16(transformer):
        copies = [weakref.ref(module.weight) for module in of_products_by_kind(transformer)]
        assert {copy().dtype for copy in copies} == {torch.bfloat16}  # type: ignore[union-attr]
        nats = loss(transformer)
    assert {name: id(p) for name, p in transformer.named_parameters()} == {name: id(p) for name, p in before.items()}
    nats.backward()
    assert not [copy for copy in copies if copy() is not None]
    with pytest.raises(ZeroDivisionError), in_bfloat16(transformer):
        raise ZeroDivisionError
    assert all(isinstance(module.weight, nn.Parameter) for module in of_products_by_kind(transformer))


def test_a_later_pass_without_copies_has_float32_gradients_as_before() -> None:
    transformer, other = made(), made()
    with in_bfloat16(transformer):
        nats = loss(transformer)
    nats.backward()
    transformer.zero_grad()
    for each in (transformer, other):
        for _ in range(2):  # they are added up
            loss(each).backward()
    for (name, p), q in zip(transformer.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad), name


def test_frozen_weights_and_those_of_other_kinds_have_no_copies() -> None:
    transformer = made()
    LoRA(rank=2).apply(transformer)
    assert not of_products(transformer)
    mixture = made(num_moe_experts=2, moe_router_topk=1)
    assert Counter(type(module) for module in of_products(mixture)) == {Linear: 4, nn.Linear: 2, GroupedLinear: 4}
