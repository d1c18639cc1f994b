"""Compilation, recomputation and float8 do not change losses, gradients and parameter names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.computation import Computation
from fiddlehead.models.speed import compile_transformer, recompute_activations
from fiddlehead.training import LanguageModel
from tests.allocated import Allocated

CONFIG: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 61,
    "seq_length": 24,
    "attention_backend": "sdpa_flash",
}


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def loss_and_gradients(model: Transformer, width: torch.dtype = torch.float32) -> list[torch.Tensor]:
    ids = torch.arange(48).view(2, 24) % 61
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=width == torch.bfloat16):
        loss = model(ids, labels=ids.roll(-1, 1)) / ids.numel()
    balance = model.aux_loss()
    loss = loss if balance is None else loss + balance / ids.numel()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def kept_bytes(model: Transformer) -> int:
    """What the forward pass leaves in memory for the backward pass, whoever holds it."""
    ids = torch.arange(48).view(2, 24) % 61
    with Allocated() as allocated:
        loss = model(ids, labels=ids.roll(-1, 1))
        kept = allocated.now
    del loss
    return kept


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_activations_change_nothing(recompute: Any, mixture: bool) -> None:
    more = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1} if mixture else {}
    plain, other = (Transformer(TransformerConfig(**CONFIG, **more)) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    recompute_activations(other, recompute)
    assert list(other.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(loss_and_gradients(other), loss_and_gradients(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_a_backward_pass_leaves_nothing_but_gradients(recompute: Any) -> None:
    """A balancing loss that is computed again would keep the layer's tensors until the next step."""
    model = Transformer(TransformerConfig(**CONFIG, num_moe_experts=4, moe_aux_loss_coeff=0.1))
    if recompute:
        recompute_activations(model, recompute)
    ids = torch.arange(48).view(2, 24) % 61
    with Allocated() as allocated:
        (model(ids, labels=ids.roll(-1, 1)) + model.aux_loss()).backward()
        left = allocated.now
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    assert left - gradients < 48 * model.config.hidden_size


def test_recomputing_keeps_less() -> None:
    kept = {}
    for recompute in (None, "selective", "full"):
        model = Transformer(TransformerConfig(**CONFIG))
        if recompute:
            recompute_activations(model, recompute)
        kept[recompute] = kept_bytes(model)
    assert kept["full"] < kept["selective"] < kept[None]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.parametrize(
    ("compile", "recompute"),
    [
        *(("layers", recompute) for recompute in (None, "full", 0.3)),
        ("model", None),
        pytest.param("layers", "selective", marks=pytest.mark.long),
        *(pytest.param("model", recompute, marks=pytest.mark.long) for recompute in ("full", "selective", 0.3)),
    ],
)
def test_a_compiled_model_is_the_same(compile: Any, recompute: Any) -> None:
    plain, other = (Transformer(TransformerConfig(**CONFIG)) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    if recompute is not None:
        recompute_activations(other, recompute)
    compile_transformer(other, compile)
    assert list(other.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(loss_and_gradients(other), loss_and_gradients(plain), strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
    assert torch._functorch.config.activation_memory_budget == 1.0  # pyright: ignore


def test_a_part_of_the_activations_is_kept_by_its_own_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler works in the first call of each, and finds there what that model asked for."""
    seen: list[float] = []

    def compiled(function: Any, **options: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.append(torch._functorch.config.activation_memory_budget)  # pyright: ignore
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    models = [Transformer(TransformerConfig(**({**CONFIG, "num_layers": 1}))) for _ in range(3)]
    for model, part in zip(models, (0.3, None, 0.6), strict=True):
        if part is not None:
            recompute_activations(model, part)
        compile_transformer(model, "layers")
        model.compiled = False
    for model in models:
        loss_and_gradients(model)
    assert seen == [0.3, 1.0, 0.6]
    assert torch._functorch.config.activation_memory_budget == 1.0  # pyright: ignore


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compile": "layer"}, "did you mean 'layers'?"),
        ({"activation_checkpointing": "fulll"}, "did you mean 'full'?"),
        ({"activation_checkpointing": 1.5, "compile": "layers"}, "0 to 1"),
        ({"activation_checkpointing": 0.5}, "the compiler chooses"),
        ({"fp8": "tensor"}, "tensorwise"),
        ({"fp8_all_gather": 1, "fp8": "tensorwise"}, "must be True or False"),
        ({"fp8_all_gather": True}, "fp8='tensorwise'"),
        ({"fp8_all_gather": True, "fp8": "rowwise"}, "fp8='tensorwise'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], said: str) -> None:
    (problem,) = Computation(**settings).problems()
    assert problem.startswith(next(iter(settings)))
    assert said in problem
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LanguageModel(TransformerConfig(**CONFIG), **settings)


def test_right_settings_are_taken() -> None:
    for recompute in (None, "full", "selective", 0.5, 1):
        assert Computation("layers", recompute, "rowwise").problems() == []
