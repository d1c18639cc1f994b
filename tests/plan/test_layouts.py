"""The search for layouts: what it finds fits, is sorted by speed, and is planned again as it was found."""

from __future__ import annotations

import pytest

from fiddlehead import launch
from fiddlehead.plan.cards import CARDS
from fiddlehead.plan.layouts import Layout
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes import llama, mistral


def found(recipe: Recipe, card: str = "h100") -> tuple[Layout, ...]:
    return launch.plan(recipe, target=CARDS[card], search=True).training.layouts


@pytest.mark.parametrize("make", [llama.llama3_8b, llama.llama3_70b_64k, mistral.mixtral_8x7b, llama.llama31_405b])
def test_what_is_found_fits_and_the_fastest_comes_first(make) -> None:
    layouts = found(make())
    assert layouts and all(each.memory.fits(CARDS["h100"].gib) == "fits" for each in layouts)
    steps = [each.speed.step for each in layouts]
    assert steps == sorted(steps)


@pytest.mark.parametrize("make", [llama.llama3_8b, llama.llama3_8b_64k])  # the second splits sequences already
def test_the_edits_of_a_layout_make_a_run_that_takes_what_was_found(make) -> None:
    recipe = make()
    for each in found(recipe)[:10]:
        planned = launch.plan(apply_overrides(recipe, each.edits), target=CARDS["h100"])
        assert not planned.problems
        training = planned.training
        assert training.memory == each.memory and training.speed == each.speed
        assert training.tokens_per_step == 512 * recipe.data.seq_length, "the global batch does not change"


def test_without_a_search_or_a_known_card_there_are_none() -> None:
    assert launch.plan(llama.llama3_8b(), target=CARDS["h100"]).training.layouts == ()
    assert launch.plan(llama.llama3_8b(), target="unknown", search=True).training.layouts == ()


def test_one_gpu_has_nothing_to_share() -> None:
    recipe = llama.llama32_1b()
    recipe.trainer.devices = 1
    layouts = found(recipe)
    assert layouts and {(each.tensor_parallel, each.context_parallel) for each in layouts} == {(1, 1)}
    assert found(recipe, "rtx4090") == ()


def test_what_the_optimizer_refuses_is_not_found() -> None:
    recipe = llama.llama3_8b()
    assert any(each.tensor_parallel > 1 for each in found(recipe))
    layouts = found(apply_overrides(recipe, ["optim=Muon"], find=catalog.find_part))
    assert layouts and all(each.tensor_parallel == 1 for each in layouts)
