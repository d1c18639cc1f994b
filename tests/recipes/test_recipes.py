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
    plan = launch.check(make(name))
    assert plan.parameters > 0 and plan.attention.backend


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
    assert make(name).trainer.max_steps != 1
