"""Tests of every built-in recipe; new recipes are included automatically."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from fiddlehead import launch
from fiddlehead.checkpoints.huggingface.families import FAMILIES, family_for
from fiddlehead.errors import ConfigError
from fiddlehead.plan import layouts
from fiddlehead.plan.cards import CARDS
from fiddlehead.recipe import Recipe, catalog

GOLDEN = Path(__file__).parent / "golden"
ENTRIES = {entry.name: entry for entry in catalog.recipes() if entry.module.startswith("fiddlehead.")}


@pytest.fixture(params=sorted(ENTRIES))
def name(request) -> str:
    return request.param


def make(name: str) -> Recipe:
    return ENTRIES[name].load()()


def trains_on_gpus(recipe: Recipe) -> bool:
    return recipe.trainer.accelerator == "gpu" and recipe.model.config is not None


PUBLISHED = {
    # Those of the published weights, each parameter once: a head that is the embedding too is not counted again, and
    # Gemma 3's vision tower is left out.
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_8b_64k": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "mistral_nemo_12b": 12_247_782_400,
    "mixtral_8x7b": 46_702_792_704,
    "qwen25_500m": 494_032_768,
    "qwen25_1p5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352,
    "qwen25_72b": 72_706_203_648,
    "qwen3_600m": 596_049_920,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_1b": 999_885_952,
    "phi3_mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "starcoder2_3b": 3_030_371_328,
    "starcoder2_7b": 7_173_923_840,
    "starcoder2_15b": 15_957_889_024,
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1p5b": 1_557_611_200,
    "gpt_oss_20b": 20_914_757_184,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1p7b": 1_711_376_384,
}
FAMILY_FILES = {name for name, entry in ENTRIES.items() if entry.file.name not in ("tiny.py", "finetune.py")}
MEASURED = ("tensor_parallel", "context_parallel", "reshard_after_forward")
"""The fields of `Parallel` whose speed was measured."""
ROOT = Path(__file__).parents[2]
TABLES = runpy.run_path(str(ROOT / "docs" / "model_tables.py"))
PAGE = (ROOT / "docs" / "models.md").read_text()


def test_it_fits_its_gpus_is_as_fast_as_the_table_says_and_has_the_published_size(name, monkeypatch):
    """Planned once, which takes longest: 5 % of 80 GB are to spare, and its model can be exported."""
    recipe = make(name)
    if not trains_on_gpus(recipe):
        pytest.skip("it trains on a CPU, or its model is not known")
    plan: Any = launch.plan(recipe, target=CARDS["h100"]).training
    assert plan.verdict == "fits", plan.rows()
    if hasattr(ENTRIES[name].load(), "finetune_recipe"):
        assert TABLES["row"](name, plan) in PAGE.splitlines(), "run: python docs/model_tables.py"
    assert plan.parameters == PUBLISHED.get(name, plan.parameters) > 0
    if name in FAMILY_FILES:
        check_family(name, plan.config)
    monkeypatch.setattr(layouts, "AXES", MEASURED)  # the others are 1
    measured = [
        each.speed.tokens_per_s for each in launch.search(recipe, target=CARDS["h100"]) if each.speed is not None
    ]
    assert measured[0] <= 1.05 * plan.speed.tokens_per_s, "a layout is more than 5 % faster"


def check_family(name: str, config: Any) -> None:
    """Fails unless a family writes the model as Hugging Face has it, and GPT-2 exactly its own."""
    if name != "gpt3_175b":  # which nobody has published, but it is a GPT-2
        assert family_for(config).model_type in FAMILIES
    assert FAMILIES["gpt2"].expresses(config) == name.startswith(("gpt2", "gpt3"))


def test_published_sizes_and_families_are_of_recipes_that_are_planned() -> None:
    planned = {name for name in ENTRIES if trains_on_gpus(make(name))}
    assert PUBLISHED.keys() <= planned and planned >= FAMILY_FILES


def test_the_plan_of_a_run_on_a_cpu_or_of_an_unknown_model_can_be_made_on_any_machine(name):
    recipe = make(name)
    if trains_on_gpus(recipe):
        pytest.skip("it is planned for its GPUs")
    if recipe.model.config is None:  # of what it is to begin with nothing is known yet
        with pytest.raises(ConfigError, match="init_from"):
            launch.plan(recipe, target="unknown").refuse_problems()
        return
    plan: Any = launch.plan(recipe, target="unknown").training
    assert plan.parameters > 0
    assert all(served.choice.backend for served in plan.attention)


def test_the_table_of_models_has_only_model_recipes_for_gpus(name):
    if not hasattr(ENTRIES[name].load(), "finetune_recipe") or make(name).trainer.accelerator != "gpu":
        assert f"| `{name}` |" not in PAGE


def test_a_saved_recipe_loads_back_equal(name, tmp_path):
    recipe = make(name)
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert not recipe.names_to_allow()


def test_every_recipe_has_a_summary(name):
    assert ENTRIES[name].summary.endswith(".") and ENTRIES[name].task


def test_a_recipe_resolves_to_the_text_in_the_repository(name):
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


def test_two_recipes_of_one_function_share_nothing(name):
    first = make(name)
    first.trainer.max_steps = 1
    assert make(name).trainer.max_steps != 1
    if first.model.config is not None:
        first.model.config.num_layers = 77
        assert make(name).model.config.num_layers != 77


def test_windows_and_scaled_positions_can_be_written_down(tmp_path):
    recipe = make("llama32_1b")
    config = recipe.model.config
    config.window_size, config.window_attn_skip_freq, config.rope_scaling.low_freq_factor = (1023, 0), (1, 0) * 8, 2.0
    recipe.save(tmp_path / "r.yaml")
    loaded = Recipe.load(tmp_path / "r.yaml")
    assert loaded == recipe
    found = launch.plan(loaded, target="unknown").training.config
    assert (found.window(0), found.window(1)) == ((1023, 0), (-1, -1)) and found.rope_scaling.low_freq_factor == 2.0
