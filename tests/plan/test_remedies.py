"""The smallest changes that make a recipe fit: they are few, they fit when planned, and they cost what is said."""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

import pytest

from fiddlehead import launch
from fiddlehead.plan.cards import CARDS
from fiddlehead.plan.training import TrainingPlan
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes import gpt, llama, mistral

KEEP = "model.activation_checkpointing=None"
FULL = ["model.activation_checkpointing=full", "data.micro_batch_size=1"]
WHOLE = [*FULL, "trainer.num_nodes=1", "trainer.precision=bf16-true"]
HALF_A_MILLION = [
    *("trainer.devices=1", "trainer.strategy=auto", "data.seq_length=524288", "data.global_batch_size=1"),
    *("model.activation_offloading=True", "model.tiled_mlp=8192", "optim.state_offloading=True"),
]
CASES: dict[str, tuple[Any, list[str], str]] = {
    "a large micro-batch": (llama.llama3_8b, [KEEP, "data.micro_batch_size=4"], "h100"),
    "long sequences": (llama.llama3_8b_64k, [KEEP], "h100"),
    "a small GPU": (llama.llama32_1b, ["trainer.devices=1", "data.micro_batch_size=1"], "rtx4090"),
    "float32": (llama.llama32_3b, ["trainer.devices=1", "trainer.precision=32-true", "data.seq_length=2048"], "l40s"),
    "few nodes": (mistral.mixtral_8x7b, ["trainer.num_nodes=2"], "h100"),
    "a very long sequence": (llama.llama32_1b, ["trainer.devices=1", "data.seq_length=524288", *FULL], "h100"),
    "half a million tokens of 8B": (llama.llama3_8b, [*WHOLE, *HALF_A_MILLION], "h100"),
    "all of a model on one GPU": (llama.llama3_8b, [*WHOLE, "trainer.devices=1"], "h100"),
    "a pair of GPUs": (llama.llama3_8b, [*WHOLE, "trainer.devices=2"], "l40s"),
    "copies": (gpt.gpt2_1p5b, ["trainer.strategy=ddp", "data.micro_batch_size=16"], "a100_40"),
}


def edited(recipe: Recipe, *edits: str) -> Recipe:
    return apply_overrides(recipe, edits, find=catalog.find_part)


@cache
def of(case: str) -> tuple[Recipe, TrainingPlan]:
    make, edits, gpu = CASES[case]
    recipe = edited(make(), *edits)
    return recipe, launch.plan(recipe, target=gpu).training


@pytest.mark.parametrize("case", CASES)
def test_a_remedy_makes_the_recipe_fit_and_costs_what_is_said(case: str) -> None:
    gpu = CASES[case][2]
    recipe, now = of(case)
    assert now.verdict != "fits" and 1 <= len(now.remedies) <= 6
    for each in {now.remedies[0], now.remedies[-1]}:
        planned = launch.plan(edited(recipe, *each.layout.edits), target=gpu).training
        assert (planned.verdict, planned.memory) == ("fits", each.layout.memory)
        assert planned.tokens_per_step == now.tokens_per_step
        if now.speed is None or planned.speed is None:
            assert each.relative_speed is None
        else:
            assert each.relative_speed == pytest.approx(planned.speed.tokens_per_s / now.speed.tokens_per_s)


def test_one_change_is_enough_where_one_is() -> None:
    remedies = of("a large micro-batch")[1].remedies
    assert {each.layout.edits for each in remedies} >= {("data.micro_batch_size=1",)}
    assert all(len(each.layout.edits) == 1 for each in remedies)
    speeds = [each.relative_speed for each in remedies if each.relative_speed is not None]
    assert speeds == sorted(speeds, reverse=True)


def test_bits_and_gpus_are_among_the_remedies() -> None:
    edits = {
        edit.partition("=")[0]
        for case in ("a small GPU", "few nodes")
        for r in of(case)[1].remedies
        for edit in r.layout.edits
    }
    assert edits >= {"trainer.precision", "optim.state_bits", "trainer.devices", "trainer.num_nodes"}


def test_tiles_main_memory_and_a_shared_sequence_are_remedies_for_long_sequences() -> None:
    heads, there, more = of("a very long sequence")[1].remedies
    assert heads.layout.edits == ("model.tiled_mlp=8192", "model.tiled_attention=4")
    assert there.layout.edits == ("model.tiled_mlp=8192", "model.activation_offloading=true")
    assert more.layout.edits == ("trainer.devices=2", "trainer.strategy.tensor_parallel=2")  # also of the sequences
    of_a_mixture = [edit for each in of("few nodes")[1].remedies for edit in each.layout.edits]
    assert not any(edit.startswith("model.tiled_mlp") for edit in of_a_mixture)  # it has none


def test_with_tiles_of_heads_one_gpu_trains_an_8b_model_on_half_a_million_tokens() -> None:
    recipe, whole = of("half a million tokens of 8B")
    assert whole.remedies[0].layout.edits == ("model.tiled_attention=4",)
    four, two, one = (
        launch.plan(edited(recipe, f"model.tiled_attention={groups}"), target="h100").training for groups in (4, 2, 1)
    )
    needed = [each.memory.needed_gib for each in (whole, four, two, one) if each.memory is not None]
    assert needed == sorted(needed, reverse=True) and needed[0] > 80 and needed[2] < 66
    assert four.memory is not None and two.memory is not None
    # Two key/value heads fewer, and their eight query heads: queries, keys and values and their gradients, what
    # attention gave and its gradient, and the float32 sum of the queries' gradient.
    of_token = 2 * 2 * (2 * 8 + 2 * 2) * 128 + 4 * 8 * 128
    assert four.memory.peak - two.memory.peak == pytest.approx(of_token * 2**19)
    assert whole.speed is not None and two.speed is not None
    assert 0.99 < two.speed.tokens_per_s / whole.speed.tokens_per_s < 1


def test_an_optimizer_in_main_memory_lets_one_gpu_train_what_two_train() -> None:
    recipe, now = of("all of a model on one GPU")
    remedy = next(each for each in now.remedies if "optim.state_offloading=true" in each.layout.edits)
    assert remedy.layout.edits == ("optim.state_offloading=true",)
    planned = launch.plan(edited(recipe, *remedy.layout.edits), target="h100").training
    assert planned.main_memory == {"optimizer state": 10 * planned.parameters}
    assert planned.state_gib == pytest.approx(now.state_gib) and planned.checkpoint_bytes == now.checkpoint_bytes
    assert now.device_gib - planned.device_gib == pytest.approx(10 * planned.parameters / 2**30)
    assert any(line.endswith("GiB of main memory: optimizer state") for line in planned.sections()["memory"])
    assert any("optim.state_offloading=true" in each.layout.edits for each in of("a pair of GPUs")[1].remedies)


def test_edits_are_written_as_a_shell_takes_them() -> None:
    remedy = next(each for each in of("copies")[1].remedies if any("(" in edit for edit in each.layout.edits))
    assert shlex.split(remedy.row().partition(": ")[0]) == list(remedy.layout.edits)


def test_a_plan_that_fits_has_no_remedies_and_one_that_is_tight_has() -> None:
    recipe = edited(llama.llama32_1b(), "trainer.devices=1")
    training = launch.plan(recipe, target=CARDS["h100"]).training
    assert training.verdict == "fits" and training.remedies == () and training.to_dict()["remedies"] == []
    assert training.memory is not None
    gib = (1.03 * training.memory.peak + training.memory.outside) / 2**30 + 0.1
    tight = launch.plan(recipe, target=f"mine={gib},989,3350").training
    assert tight.verdict == "tight" and tight.remedies
    lines = tight.sections()["memory"]
    assert lines[lines.index("what makes it fit:") + 1] == f"  {tight.remedies[0].row()}"
