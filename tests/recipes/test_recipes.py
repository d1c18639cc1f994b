"""Every shipped recipe: a new one is tested for free."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fiddlehead import catalog, launch
from fiddlehead.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"
ENTRIES = {entry.name: entry for entry in catalog.recipes() if entry.module.startswith("fiddlehead.")}


@pytest.fixture(params=sorted(ENTRIES))
def name(request) -> str:
    return request.param


def make(name: str) -> Recipe:
    return ENTRIES[name].load()()


def test_the_plan_can_be_made_on_any_machine(name):
    recipe = make(name)
    plan = launch.check(recipe, here=False)
    assert plan.parameters > 0
    if recipe.trainer.accelerator == "cpu":
        assert all(choice.backend for _, choice in plan.attention)


def test_it_loads_back_equal(name, tmp_path):
    recipe = make(name)
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert not recipe.modules()


def test_it_says_what_it_is(name):
    assert ENTRIES[name].summary.endswith(".") and ENTRIES[name].task


def test_the_golden_text(name):
    """What a recipe resolves to, as text in the repository, so that a review sees what a change changes.

    `UPDATE_GOLDEN=1 pytest tests/recipes` writes it anew.
    """
    file = GOLDEN / f"{name}.yaml"
    text = make(name).to_yaml()
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), "run with UPDATE_GOLDEN=1"
    assert text == file.read_text()


def test_no_golden_text_is_left_over():
    assert {file.stem for file in GOLDEN.glob("*.yaml")} == set(ENTRIES)


def test_two_calls_share_nothing(name):
    first = make(name)
    first.trainer.max_steps = 1
    first.model.config.num_layers = 77
    assert make(name).trainer.max_steps != 1 and make(name).model.config.num_layers != 77


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama3_8b", 8_030_261_248), ("llama3_8b_64k", 8_030_261_248), ("llama32_1b", 1_235_814_400)],
)
def test_llama_has_as_many_parameters_as_meta_s(name, parameters):
    assert launch.check(make(name), here=False).parameters == parameters


def test_windows_and_scaled_positions_can_be_written_down(tmp_path):
    recipe = make("llama32_1b")
    config = recipe.model.config
    config.window_size, config.window_attn_skip_freq, config.rope_scaling.low_freq_factor = (1023, 0), (1, 0) * 8, 2.0
    recipe.save(tmp_path / "r.yaml")
    loaded = Recipe.load(tmp_path / "r.yaml")
    assert loaded == recipe
    found = launch.check(loaded, here=False).config
    assert (found.window(0), found.window(1)) == ((1023, 0), (-1, -1)) and found.rope_scaling.low_freq_factor == 2.0
