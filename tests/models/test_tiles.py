"""A feed-forward in tiles has the losses and gradients of one that is computed at once, and a tile's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.models.computation import Computation
from fiddlehead.models.speed import compile_transformer, recompute_activations, tile_mlp
from fiddlehead.models.tiles import in_tiles
from fiddlehead.training import LanguageModel
from fiddlehead.training.distributed.sizes import Sizes
from tests.allocated import Allocated
from tests.models.parallel_ranks import MODELS

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 61,
    "seq_length": 17,
    "init_method_std": 0.2,
}
TOKENS = 2 * 17
Gradients = dict[str, torch.Tensor]


@pytest.fixture
def compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def made(tokens: int | None = None, recompute: Any = None, lora: LoRA | None = None, **changes: Any) -> Transformer:
    """A model with weights that are the same whenever it is made."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL | changes))
    if lora is not None:
        lora.apply(model)
    with torch.no_grad():  # what starts at 0 would hide its gradients
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if tokens is not None:
        tile_mlp(model, tokens)
    if recompute is not None:
        recompute_activations(model, recompute)
    return model


def learned(model: Transformer, autocast: bool = False) -> Gradients:
    """The loss and the gradient of each parameter that learns, in float64."""
    ids = torch.arange(TOKENS).view(2, 17) % 61
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids.roll(-1, 1)) / TOKENS
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), **found}


def error(found: Gradients, expected: Gradients) -> dict[str, float]:
    """How far each is from what is expected, relative to it."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}


@pytest.mark.parametrize("tokens", [1, 5, 17, TOKENS, 100])
@pytest.mark.parametrize("shape", ["multi-head", "biases", "sinks", "head norms", "projection norms"])
def test_a_tiled_model_learns_the_same(shape: str, tokens: int) -> None:
    """Tiles that divide the tokens, that leave a rest, and one of more tokens than there are."""
    plain, tiled = (made(each, **MODELS[shape]).double() for each in (None, tokens))
    assert list(tiled.state_dict()) == list(plain.state_dict())
    limit = 1e-12 if shape != "head norms" else 1e-6  # these norms are in float32 inside
    assert max(error(learned(tiled), learned(plain)).values()) < limit


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_recomputed_tiled_model_learns_the_same(recompute: str) -> None:
    found, expected = learned(made(5, recompute).double()), learned(made().double())
    assert max(error(found, expected).values()) < 1e-12


@pytest.mark.parametrize("recompute", [None, "full"])
def test_in_bfloat16_gradients_are_as_close_as_without_tiles(recompute: str | None) -> None:
    """In a few places rounding may go the other way; a sum of tiles in bfloat16 would be off by more."""
    exact = learned(made().double())
    plain, tiled = (
        error(learned(made(), autocast=True), exact),
        error(learned(made(3, recompute), autocast=True), exact),
    )
    assert all(tiled[name] <= 2 * plain[name] + 1e-3 for name in plain)
    assert max(plain.values()) > 1e-3


def test_gradients_of_bfloat16_weights_are_summed_in_float32() -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16, requires_grad=True)
    x = torch.ones(1, 1000, 4, dtype=torch.bfloat16)
    in_tiles(lambda tile: tile @ weight, x, 1, lambda: [weight]).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert torch.equal(weight.grad, torch.full_like(weight, 1000))  # in bfloat16 the sum would stop at 256


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("dora", [False, True])
def test_tiled_adapters_learn_the_same(dora: bool, recompute: str | None) -> None:
    lora = LoRA(rank=4, dora=dora)
    found, expected = (learned(made(*how, lora=lora).double()) for how in ((5, recompute), (None, None)))
    assert sum("lora_a" in name for name in expected) > 4 and "layers.0.mlp.linear_fc1.weight" not in expected
    assert max(error(found, expected).values()) < 1e-12


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_dropout_is_the_same_in_both_passes(recompute: str | None) -> None:
    """The gradient is the slope of the loss for the same random numbers, which go on as if there was no second pass."""
    assert slope_is_right(made(5, recompute, LoRA(rank=4, dropout=0.3), **DROPOUT).double())


DROPOUT: dict[str, Any] = {"hidden_dropout": 0.3, "position_embedding_type": "none"}
"""Without rotary tables, which are float32."""


def slope_is_right(model: Transformer) -> bool:
    ids = torch.arange(TOKENS).view(2, 17) % 61
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return model(ids, labels=ids)

    start = loss()
    drawn = torch.get_rng_state()
    gradients = torch.autograd.grad(start, learns)
    assert torch.equal(torch.get_rng_state(), drawn)
    directions = [torch.randn_like(parameter) for parameter in learns]
    step, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(learns, directions, strict=True):
                parameter += sign * step * direction
            losses.append(float(loss()))
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    return (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_a_tile_is_computed_twice_and_attention_as_without_tiles(recompute: str | None) -> None:
    model, seen, attended = made(10, recompute), [], []
    layer: Any = model.layers[0]
    layer.mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    layer.self_attention.register_forward_pre_hook(lambda *args: attended.append(1))
    learned(model)
    assert seen == 2 * [10, 10, 10, 4]
    assert len(attended) == (1 if recompute is None else 2)
    with torch.no_grad():
        model(torch.zeros(1, 17, dtype=torch.int64))
    assert seen[8:] == [10, 7]


def test_a_hook_on_a_gradient_runs_once() -> None:
    """Strategies wait for gradients with such hooks."""
    model, seen = made(5), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    learned(model)
    assert len(seen) == len(list(model.parameters()))


def peak_of(run: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> int:
    x = torch.ones(1, tokens, 8, requires_grad=True)
    with Allocated() as allocated:
        run(x).sum().backward()
    return allocated.peak


def test_the_intermediate_tensors_of_one_tile_are_in_memory() -> None:
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 2000), torch.nn.GELU(), torch.nn.Linear(2000, 8))
    parameters = partial(list, mlp.parameters())
    weights, stream = sum(p.nbytes for p in parameters()), 1024 * 8 * 4
    whole, of_tile = peak_of(mlp, 1024), peak_of(mlp, 64)
    for parameter in parameters():
        parameter.grad = None
    found = peak_of(lambda x: in_tiles(mlp, x, 64, parameters), 1024)
    # Besides a tile: the output, its gradient and that of the input, and the sums of the weights' gradients.
    assert found <= of_tile + 3 * stream + weights
    assert found < whole / 6


def test_a_tiled_layer_keeps_less() -> None:
    kept = {}
    ids = torch.arange(TOKENS).view(2, 17) % 61
    for tokens in (None, 8):
        for recompute in (None, "selective", "full"):
            model = made(tokens, recompute)
            with Allocated() as allocated:
                loss = model(ids, labels=ids)
                kept[tokens, recompute] = allocated.now
            del loss
    assert kept[8, None] < 0.75 * kept[None, None]
    assert kept[8, "full"] == kept[None, "full"] < kept[8, "selective"] < kept[None, "selective"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.parametrize("recompute", [None, "full", pytest.param("selective", marks=pytest.mark.long)])
def test_a_compiled_tiled_model_learns_the_same(recompute: str | None, compiler: None) -> None:
    model = made(10, recompute)
    compile_transformer(model, "layers")
    assert max(error(learned(model), learned(made())).values()) < 1e-5
    model = made(10, recompute, **DROPOUT).double()
    compile_transformer(model, "layers")
    assert slope_is_right(model)


def test_impossible_tiles_are_named() -> None:
    def said(tiled_mlp: Any, compile: Any = None, recompute: Any = None, fp8: Any = None) -> list[str]:
        computation = Computation(compile, recompute, fp8, tiled_mlp=tiled_mlp)
        return [str(problem) for problem in computation.problems()]

    assert said(8192, "layers", "full") == said(1) == said(None, "model", 0.5, "rowwise") == []
    for bad in (0, -5, True, 2.5, "8k"):
        (problem,) = said(bad)
        assert problem.startswith("tiled_mlp=") and "such as 8192" in problem
    for others, word in ((("model",), "compile="), (("layers", 0.5), "'selective'"), ((None, None, "rowwise"), "fp8=")):
        (problem,) = said(8192, *others)
        assert problem.startswith("tiled_mlp=8192") and word in problem
    with pytest.raises(ConfigError, match="experts of a mixture"):
        made(8, num_moe_experts=4)


def test_a_plan_refuses_tiles_of_a_mixture() -> None:
    model = LanguageModel(TransformerConfig(**SMALL, num_moe_experts=4), tiled_mlp=8)
    (problem,) = model.problems("32-true", Sizes(1, 1))
    assert problem.startswith("model.tiled_mlp=8: the experts")
