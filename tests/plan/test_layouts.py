"""The search for layouts: it finds what trying each one finds, and what it finds is planned, and trains, as found."""

from __future__ import annotations

import ast
import itertools
import random
import time
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from fiddlehead import launch, tasks
from fiddlehead.attention import Package
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models import LoRA, gated_mlp
from fiddlehead.plan.cards import CARDS, Card
from fiddlehead.plan.layouts import AXES, Layout, layouts
from fiddlehead.plan.rank_memory import Devices, Training
from fiddlehead.plan.training import plan_training, search_layouts
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes import gpt, llama, mistral, qwen
from fiddlehead.training import LanguageModel, Muon, Parallel
from fiddlehead.training.distributed.sizes import Sizes
from tests.training.conftest import make_parts
from tests.training.ranks import on_ranks


def edited(recipe: Recipe, *edits: str) -> Recipe:
    return apply_overrides(recipe, edits, find=catalog.find_part)


def found(recipe: Recipe, card: Card = CARDS["h100"]) -> list[Layout]:
    return launch.search(recipe, target=card)


def small(gib: float) -> Card:
    """An H100 with so much memory."""
    return Card("small", gib, 989e12, 3350e9, "h100")


SHAPE = ["num_layers=6", "hidden_size=768", "ffn_hidden_size=1536", "num_attention_heads=6", "num_query_groups=2"]
TINY = [f"model.config.{each}" for each in [*SHAPE, "kv_channels=128", "vocab_size=4096"]]
SIX = [*TINY, "trainer.devices=6", "data.global_batch_size=12", "data.seq_length=6144"]
EXPERTS = ["model.config.num_moe_experts=4", "model.compile=None", "trainer.devices=4", "data.global_batch_size=8"]
BRUTE: dict[str, tuple[list[str], Card, dict[str, Any]]] = {
    "six GPUs": (SIX, small(7.5), {"tensor": (1, 2, 3), "context": (1, 2), "pipeline": (1, 3, 6)}),
    "experts": ([*TINY, *EXPERTS], small(7.5), {"tensor": (1, 2), "expert": (1, 2), "pipeline": (1, 2)}),
}


def test_tiles_and_offloading_stay_and_what_they_refuse_is_not_proposed() -> None:
    recipe = edited(llama.llama32_1b(), "model.tiled_mlp=4096", "trainer.devices=1")
    assert {each.activation_checkpointing for each in found(recipe)} == {None, "selective", "full"}
    recipe = edited(recipe, "model.activation_checkpointing=full", "model.activation_offloading=True")
    assert {each.activation_checkpointing for each in found(recipe)} == {"full"}


@pytest.mark.parametrize("case", BRUTE)
def test_all_layouts_that_a_plan_says_fit_are_found_and_no_others(case: str) -> None:
    edits, card, splits = BRUTE[case]
    recipe, expected, refused, tried_choices = edited(llama.llama3_8b(), *edits), {}, [], set()
    for micro, recompute, *numbers in itertools.product((1, 2), ("full",), *splits.values()):
        tried = recipe.clone()
        tried.data.micro_batch_size, tried.model.activation_checkpointing = micro, recompute
        for axis, number in zip(splits, numbers, strict=True):
            setattr(tried.trainer.strategy, f"{axis}_parallel", number)
        tried_choices.add((micro, recompute, *numbers))
        training = launch.plan(tried, target=card).known
        if training is not None and training.verdict == "fits":
            expected[micro, recompute, *numbers] = training.memory, training.speed
        else:
            refused.append(training)
    tried_edits = ("data.micro_batch_size", "model.activation_checkpointing")
    tried_edits += tuple(f"trainer.strategy.{axis}_parallel" for axis in splits)
    by_choice = {
        (each.micro_batch_size, each.activation_checkpointing, *(getattr(each.sizes, axis) for axis in splits)): each
        for each in found(recipe, card)
        if all(edit.startswith(tried_edits) for edit in each.edits)
    }
    by_choice = {choice: each for choice, each in by_choice.items() if choice in tried_choices}
    assert 5 < len(expected) < len(refused) + len(expected)
    assert {choice: (each.memory, each.speed) for choice, each in by_choice.items()} == expected


def test_more_ranks_share_a_sequence_than_heads_do_unless_the_recipe_says_ulysses() -> None:
    few = ["model.config.num_attention_heads=2", "model.config.num_query_groups=1", "data.seq_length=65536"]
    recipe = edited(edited(llama.llama3_8b(), *TINY), *few, "data.global_batch_size=8", "data.micro_batch_size=1")
    method = "trainer.strategy.context_parallel_method=ulysses"
    most = (8, 2, 2)
    for number, edits in zip(most, ((), (method,), ("model.config.window_size=(1023,0)",)), strict=True):
        assert max(each.sizes.context for each in found(edited(recipe, *edits))) == number


def test_long_sequences_are_also_tried_in_tiles() -> None:
    one = ["trainer.devices=1", "trainer.strategy=auto", "data.global_batch_size=4", "data.micro_batch_size=1"]
    long = edited(llama.llama32_1b(), *one, "data.seq_length=131072")
    tiled = "model.tiled_mlp=8192"
    with_tiles, without = (
        [each for each in found(long) if (tiled in each.edits) == wanted] for wanted in (True, False)
    )
    assert with_tiles[0].speed.tokens_per_s > 1.1 * without[0].speed.tokens_per_s  # type: ignore[union-attr]
    assert with_tiles[0].activation_checkpointing == "selective"
    planned = launch.plan(edited(long, *with_tiles[0].edits), target="h100").known
    assert planned is not None and (planned.memory, planned.speed) == (with_tiles[0].memory, with_tiles[0].speed)
    for edits in (["data.seq_length=16384"], ["model.tiled_mlp=4096"], ["model.fp8=tensorwise"]):
        others = found(edited(long, *edits))
        assert others and not [each for each in others if tiled in each.edits]


@pytest.mark.parametrize(
    ("make", "length", "tiled"),
    [(llama.llama32_1b, 2**20, []), (llama.llama3_8b, 2**19, ["model.tiled_attention=4"])],
)
def test_the_longest_sequences_have_what_they_can_in_main_memory_and_tiles(
    make: Any, length: int, tiled: list[str]
) -> None:
    one = ["trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", "trainer.precision=bf16-true"]
    recipe = edited(make(), *one, f"data.seq_length={length}", "data.micro_batch_size=1", "data.global_batch_size=1")
    fastest, *_ = found(recipe)
    least = {"model.tiled_mlp=8192", "model.activation_offloading=true", "model.activation_checkpointing=full", *tiled}
    assert least <= set(fastest.edits) <= least | {"optim.state_offloading=true"}
    planned = launch.plan(edited(recipe, *fastest.edits), target="h100").known
    assert planned is not None and (planned.memory, planned.speed) == (fastest.memory, fastest.speed)


def test_a_model_that_is_compiled_as_one_is_compiled_by_layers_with_tiles() -> None:
    compiled = ["model.compile=model", "data.seq_length=65536", "data.global_batch_size=1", "data.micro_batch_size=1"]
    recipe = edited(llama.llama32_1b(), "trainer.devices=1", "trainer.strategy=auto", *compiled)
    in_tiles = [each.edits for each in found(recipe) if "model.tiled_mlp=8192" in each.edits]
    assert in_tiles and all("model.compile=layers" in edits for edits in in_tiles)
    assert launch.plan(edited(recipe, *in_tiles[0]), target="h100").known is not None


ODD = ["model.config.num_attention_heads=56", "model.config.num_layers=28", "model.config.kv_channels=64"]
MIXTURE = ["model.config.num_layers=4", "trainer.num_nodes=3", "data.global_batch_size=96"]
CASES: dict[str, tuple[Any, list[str]]] = {
    "six GPUs": (llama.llama32_3b, ["trainer.devices=6", "data.global_batch_size=96", "data.seq_length=6144"]),
    "three nodes": (llama.llama3_8b, ["trainer.num_nodes=3", "data.global_batch_size=96"]),
    "56 heads, 28 layers": (llama.llama3_8b, [*ODD, "model.config.num_query_groups=4", "data.seq_length=7000"]),
    "seven GPUs": (llama.llama3_8b, [*ODD, "trainer.devices=7", "data.global_batch_size=70"]),
    "a layout of its own": (llama.llama3_8b_64k, ["trainer.strategy.data_parallel=2"]),
    "replicas": (llama.llama3_8b, ["trainer.num_nodes=2", "trainer.strategy.data_parallel_replicate=2"]),
    "a mixture on three nodes, whose own layout is refused": (mistral.mixtral_8x7b, MIXTURE),
    "a mixture in a pipeline": (
        qwen.qwen3_30b_a3b,
        [
            "model.config.num_layers=4",
            "model.config.moe_aux_loss_coeff=0",
            "model.compile=None",
            "model.activation_checkpointing=full",
        ],
    ),
    "copies": (gpt.gpt2_124m, ["trainer.strategy=ddp", "data.global_batch_size=96", "model.compile=model"]),
    "float8": (llama.llama32_1b, ["trainer.devices=1", "model.fp8=tensorwise", "model.activation_checkpointing=0.7"]),
    "Muon": (llama.llama32_1b, ["optim=Muon"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_edits_of_a_layout_make_a_run_that_takes_what_was_found(case: str) -> None:
    make, edits = CASES[case]
    recipe = edited(make(), *edits)
    every = found(recipe)
    assert all(each.memory.fits(CARDS["h100"].gib) == "fits" for each in every)
    steps = [each.speed.step for each in every if each.speed is not None]
    assert steps == sorted(steps) and len(steps) == len(every)
    assert len({each.edits for each in every}) == len(every)
    for each in [every[0], *random.Random(0).sample(every[1:], 3)]:
        planned = launch.plan(edited(recipe, *each.edits), target=CARDS["h100"])
        assert not planned.problems, each.edits
        training = planned.training
        assert (training.memory, training.speed, training.verdict) == (each.memory, each.speed, "fits"), each.edits
        assert training.tokens_per_step == recipe.data.global_batch_size * recipe.data.seq_length


def test_every_axis_is_searched() -> None:
    every = found(edited(qwen.qwen3_30b_a3b(), *CASES["a mixture in a pipeline"][1]))
    changed = {edit.partition("=")[0] for each in every for edit in each.edits}
    assert changed >= {f"trainer.strategy.{axis}" for axis in AXES}
    assert changed >= {"data.micro_batch_size", "model.activation_checkpointing"}


def test_models_with_tied_embeddings_are_cut_into_stages() -> None:
    tied = edited(llama.llama32_1b(), "model.config.share_embeddings_and_output_weights=True")
    assert max(each.sizes.pipeline for each in found(tied)) > 1


def test_experts_are_split_where_nothing_is_compiled() -> None:
    every = found(edited(mistral.mixtral_8x7b(), "model.config.num_layers=4"))
    split = [each for each in every if each.sizes.expert > 1]
    assert split and all("model.compile=None" in each.edits for each in split)


@pytest.mark.parametrize("base", [None, "nf4"])
def test_adapters_are_split_over_tensors_and_stages_but_not_with_weights_in_4_bits(
    monkeypatch: pytest.MonkeyPatch, base: str | None
) -> None:
    """The model on the meta device is made once by a plan, and not again by the search."""
    recipe, made = edited(llama.llama3_8b(), "model.config.num_layers=4"), []
    on_meta = LanguageModel.on_meta
    monkeypatch.setattr(LanguageModel, "on_meta", lambda *given: made.append(on_meta(*given)) or made[-1])
    with launch.planning.built(recipe, CARDS["h100"]) as (parts, card):
        model = parts["model"]
        model.lora = fdl.build(fdl.Config(LoRA, rank=16, quantize_base=base))
        devices = Devices.of(parts["trainer"])
        assert plan_training(**parts, target=card).trained < 1e9 and len(made) == 1
        training = Training(model, made[0], parts["data"], devices, parts["optim"])
        every = layouts(training, card)
    assert len(made) == 1
    splits = {(each.sizes.tensor, each.sizes.pipeline) for each in every}
    assert splits == {(1, 1)} if base else splits >= {(1, 1), (2, 1), (1, 2), (2, 2)}
    assert max(each.sizes.context for each in every) > 1


def test_data_that_is_not_here_is_no_obstacle_if_the_vocabulary_is_known() -> None:
    recipe = edited(llama.llama32_1b(), "trainer.devices=1", "data.paths=['/nowhere']")
    with pytest.raises(ConfigError, match="/nowhere"):
        found(edited(recipe, "model.config.vocab_size=None"))
    recipe = edited(recipe, "model.config.vocab_size=128256")
    assert [each.edits for each in found(recipe)] == [each.edits for each in found(edited(recipe, "data.paths=None"))]


def test_the_search_for_the_largest_model_takes_seconds() -> None:
    recipe, began = llama.llama31_405b(), time.process_time()
    assert found(recipe)
    assert time.process_time() - began < 5


def test_what_is_found_with_quacks_feed_forward_is_what_its_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_mlp, "installed", lambda: Package(gated_mlp.OLDEST))
    recipe = edited(llama.llama32_1b(), "trainer.devices=1")
    every = {each.activation_checkpointing: each for each in found(recipe) if each.micro_batch_size == 2}
    assert {None, "full", "selective", 0.9} <= every.keys()
    for layout in every.values():
        planned = launch.plan(edited(recipe, *layout.edits), target="h100").training
        assert planned.memory is not None and planned.speed is not None and layout.speed is not None
        assert planned.memory.needed_gib == pytest.approx(layout.memory.needed_gib)
        assert planned.speed.step == pytest.approx(layout.speed.step)
        assert planned.mlp is not None
        assert planned.mlp.backend == ("quack" if layout.activation_checkpointing in (None, "full") else "torch")


def test_no_layout_is_searched_for_if_the_gpu_has_not_the_feed_forward_that_is_named() -> None:
    with pytest.raises(ConfigError, match=r"mlp_backend='quack': cannot compute .*: quack-kernels is not"):
        found(edited(llama.llama32_1b(), "model.mlp_backend=quack"))


def test_one_gpu_has_nothing_to_share() -> None:
    recipe = edited(llama.llama32_1b(), "trainer.devices=1")
    every = found(recipe)
    assert {(each.sizes.tensor, each.sizes.context, each.sizes.pipeline, each.sizes.data) for each in every} == {
        (1, 1, 1, 1)
    }
    with pytest.raises(ConfigError, match="no layout fits"):
        found(recipe, small(10.0))


def test_what_the_optimizer_refuses_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = edited(llama.llama3_8b(), "optim=Muon")
    assert any(each.sizes.tensor > 1 for each in found(recipe))

    def refuses(self: Muon, precision: str, split: Sizes | None, *, adapters: bool) -> list[Problem]:
        return [Problem("optim", "Muon", "no")] if split is not None and split.tensor * split.pipeline > 1 else []

    monkeypatch.setattr(Muon, "problems", refuses)
    every = found(recipe)
    assert every and all(each.sizes.tensor == each.sizes.pipeline == 1 for each in every)


def test_a_fitted_recipe_has_the_fastest_layout_and_the_same_batch() -> None:
    recipe = llama.llama3_8b()
    fitted = recipe.fitted(gpu="h200", nodes=2)
    changed = {each.path: each.right for each in recipe.diff(fitted)}
    assert changed.pop("trainer.num_nodes") == 2 and not {"data.global_batch_size", "data.seq_length"} & changed.keys()
    best = found(edited(recipe, "trainer.num_nodes=2"), CARDS["h200"])[0]
    assert {path: str(value) for path, value in changed.items()} == dict(e.split("=", 1) for e in best.edits)
    assert launch.plan(fitted, target="h200").training.speed == best.speed
    assert recipe.trainer.num_nodes == 1, "the recipe itself stays"


@pytest.mark.parametrize(
    ("edits", "gpu", "said"),
    [
        ([], None, "gpu=None: the GPU that trains is not here"),
        ([], "h10", "gpu='h10': is not a known GPU"),
        (["trainer.num_nodes=1"], "l40s", "no layout fits; give more or larger GPUs"),
        (["trainer.precision=32-true"], "h100", "trainer.precision='32-true': its speed is not worked out"),
    ],
)
def test_a_recipe_that_cannot_be_fitted_is_refused(
    edits: list[str], gpu: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=said):
        edited(llama.llama3_70b(), *edits).fitted(gpu=gpu)


TRAINED = {"num_layers": 4, "global_batch_size": 8, "max_steps": 1, "val_check_interval": 1, "every_n_steps": 1}
TRAINED |= {"precision": "bf16-mixed", "devices": 2}


def test_what_is_found_for_two_ranks_trains_on_them(dataset: Path, tmp_path: Path) -> None:
    parts = make_parts(dataset, tmp_path, strategy=Parallel(), **TRAINED)
    chosen: dict[str, tuple[str, ...]] = {}  # the fastest that changes each axis, of those with the fewest axes
    axes = ("tensor_parallel", "context_parallel", "pipeline_stages_per_rank", "reshard_after_forward")
    every = search_layouts(**parts, target=CARDS["h100"])
    for axis in axes:
        those = [each.edits for each in every if f"strategy.{axis}=" in " ".join(each.edits)]
        chosen[axis] = min(those, key=lambda edits: sum("strategy" in edit for edit in edits))
    losses = on_ranks(2, train_each, dataset, tmp_path, list(chosen.values()))
    assert losses[0] == losses[1]
    for edits, loss in zip(chosen.values(), losses[0], strict=True):
        assert loss == pytest.approx(losses[0][0], rel=0.02), edits


def train_each(dataset: Path, runs: Path, chosen: list[tuple[str, ...]]) -> list[float]:
    """Trains with the edits of each layout; the losses of the last steps."""
    losses = []
    for number, edits in enumerate(chosen):
        values = {path.rsplit(".", 1)[-1]: _value(text) for path, text in (edit.split("=") for edit in edits)}
        strategy = {axis: values.pop(axis) for axis in AXES if axis in values}
        made = make_parts(dataset, runs, strategy=Parallel(**strategy), name=f"run{number}", **TRAINED | values)
        tasks.pretrain(**made)
        losses.append(float(made["trainer"].callback_metrics["val_loss"]))
    return losses


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def test_where_nothing_fits_the_optimizer_s_state_is_in_main_memory() -> None:
    recipe = edited(llama.llama3_8b(), "trainer.devices=1", "trainer.num_nodes=1")
    best, *others = found(recipe)
    assert all(each.edits[0] == "optim.state_offloading=true" for each in (best, *others))
    planned = launch.plan(edited(recipe, *best.edits), target="h100").training
    assert (planned.verdict, planned.memory) == ("fits", best.memory)
    with pytest.raises(ConfigError, match="no layout fits"):
        found(edited(recipe, "optim=Muon"))


@pytest.mark.parametrize(
    "edits",
    [
        [
            "trainer.devices=2",
            "trainer.num_nodes=1",
            "trainer.strategy.tensor_parallel=2",
            "model.activation_checkpointing=0.5",
        ],
        ["trainer.devices=2", "trainer.num_nodes=4", "trainer.strategy.tensor_parallel=4"],
    ],
)
def test_split_layers_are_found_as_they_are_planned(edits: list[str]) -> None:
    """With a part for the compiler to choose they do not copy, nor across nodes."""
    recipe = edited(llama.llama32_1b(), *edits)
    split = [each for each in found(recipe) if each.sizes.tensor > 1][:6]
    assert split
    for each in split:
        assert launch.plan(edited(recipe, *each.edits), target="h100").training.memory == each.memory, each.edits
