"""A model's recipe takes NeMo's arguments, and fine-tunes the model on the GPUs that there are."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from fiddlehead import launch
from fiddlehead.errors import ConfigError
from fiddlehead.plan.cards import CARDS
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipes.layouts import FINETUNING
from fiddlehead.recipes.llama import llama2_13b, llama3_8b, llama3_8b_64k, llama31_405b
from fiddlehead.recipes.mistral import mixtral_8x7b
from fiddlehead.recipes.tiny import tiny_test, tiny_uptrain

ENTRIES = {entry.name: entry for entry in catalog.recipes() if entry.module.startswith("fiddlehead.")}


def plan(recipe: Recipe) -> Any:
    return launch.plan(recipe, target=CARDS[llama3_8b.gpu])


def test_the_arguments_set_the_name_the_folder_and_the_gpus_and_nothing_else() -> None:
    plain, placed = llama3_8b(), llama3_8b(name="a", dir="b", num_nodes=2, num_gpus_per_node=4)
    assert {(each.path, each.right) for each in plain.diff(placed)} == {
        ("log.name", "a"),
        ("log.dir", "b"),
        ("trainer.num_nodes", 2),
        ("trainer.devices", 4),
    }
    assert llama3_8b.pretrain_recipe(num_nodes=2) == llama3_8b(num_nodes=2)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 8), (8, 8), (16, 4)])
def test_other_gpus_keep_the_global_batch_and_shrink_the_micro_batch_if_they_need_it(nodes: int, gpus: int) -> None:
    plain, placed = llama2_13b(), llama2_13b(num_nodes=nodes, num_gpus_per_node=gpus)
    made = launch.plan(placed, target="unknown")
    assert not made.problems
    assert made.training.tokens_per_step == launch.plan(plain, target="unknown").training.tokens_per_step
    assert placed.data.micro_batch_size == min(16, 512 // (nodes * gpus))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (lambda: llama3_8b_64k(num_gpus_per_node=6), "does not divide the 6 devices"),
        (lambda: llama3_8b(num_nodes=3), "x 24 data-parallel ranks"),
        (lambda: llama31_405b(num_gpus_per_node=6, num_nodes=1), "does not divide the 6 devices"),
        (lambda: llama3_8b.finetune_recipe(num_gpus_per_node=5), "data.global_batch_size=32"),
    ],
)
def test_gpus_for_which_the_layout_or_the_batch_does_not_divide_are_problems(recipe: Any, said: str) -> None:
    assert said in "\n".join(launch.plan(recipe(), target="unknown").problems)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_a_number_of_gpus_that_cannot_be_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_nodes=.*: must be a whole number"):
        llama3_8b(num_nodes=count)


@pytest.mark.parametrize("scheme", ["lora", "dora", "qlora", "none", None])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_scheme_and_the_method_say_what_is_trained(scheme: Any, method: Any) -> None:
    recipe = llama3_8b.finetune_recipe(peft_scheme=scheme, method=method, packed_sequence=True, name="tuned")
    lora = recipe.model.lora
    found = None if lora is None else "dora" if lora.dora else "qlora" if lora.quantize_base else "lora"
    assert found == (None if scheme == "none" else scheme)
    assert recipe.data.preference == (method == "dpo")
    assert (recipe.data.packed, recipe.log.name) == (True, "tuned")
    assert recipe.model.config == llama3_8b().model.config
    made = plan(recipe)
    assert not made.problems
    assert (made.training.trained == made.training.parameters) == (lora is None)
    assert any("model.init_from=None" in reason for reason in made.missing)


@pytest.mark.parametrize(("argument", "given"), [("peft_scheme", "Lora"), ("method", "ppo")])
def test_another_scheme_or_method_is_refused(argument: str, given: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument}='{given}'"):
        llama3_8b.finetune_recipe(**{argument: given})


def test_adapters_of_a_mixture_are_on_its_attention() -> None:
    assert mixtral_8x7b.finetune_recipe().model.lora.target_modules == ["linear_qkv", "linear_proj"]


def test_a_model_on_a_cpu_is_tuned_on_a_cpu() -> None:
    recipe = tiny_test.finetune_recipe()
    assert (recipe.trainer.accelerator, recipe.trainer.precision) == ("cpu", "32-true")
    assert "strategy" not in recipe.trainer.__arguments__


def test_rows_are_as_long_as_asked_and_a_model_without_a_configuration_is_tuned_too() -> None:
    recipe = llama3_8b.finetune_recipe(seq_length=4096, packed_sequence=None)
    assert (recipe.data.seq_length, recipe.data.packed) == (4096, False)
    assert not plan(recipe).problems
    assert tiny_uptrain.finetune_recipe(peft_scheme="lora").model.config is None  # model.init_from has it


def test_the_table_of_layouts_has_every_model() -> None:
    files = {"base", "finetune", "tiny", "layouts", "model_recipe"}
    models = {name for name, entry in ENTRIES.items() if entry.file.stem not in files and not name.endswith("k")}
    assert set(FINETUNING) == models


def fitting(model: str, scheme: str | None, **gpus: int) -> Any:
    """The plan of tuning the model, after a check that its memory is enough with some to spare."""
    recipe = ENTRIES[model].load().finetune_recipe(peft_scheme=scheme, **gpus)  # type: ignore[attr-defined]
    made = plan(recipe)
    assert not made.problems
    assert made.training.verdict == "fits", made.rows()
    assert made.training.tokens_per_step == 32 * recipe.data.seq_length
    return made.training


ROOT = Path(__file__).parents[2]
TABLES = runpy.run_path(str(ROOT / "docs" / "model_tables.py"))
PAGE = (ROOT / "docs" / "models.md").read_text().splitlines()


@pytest.mark.parametrize("model", sorted(FINETUNING))
def test_a_model_is_tuned_on_the_gpus_that_its_recipe_names_as_the_table_of_models_says(model: str) -> None:
    full, lora = fitting(model, None), fitting(model, "lora")
    assert [full.world_size, lora.world_size] == [min(FINETUNING[model][key]) for key in ("full", "lora")]
    assert TABLES["tuning_row"](model, full, lora) in PAGE, "run: python docs/model_tables.py"


def test_70_billion_weights_in_4_bits_are_tuned_on_two_gpus() -> None:
    assert fitting("llama3_70b", "qlora", num_gpus_per_node=2).memory.needed_gib < 50
    assert FINETUNING["llama3_70b"]["lora"].keys() == {8}


@pytest.mark.long
@pytest.mark.parametrize(
    ("scheme", "key"), [(None, "full"), *((scheme, "lora") for scheme in ("lora", "dora", "qlora"))]
)
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("model", sorted(FINETUNING))
def test_a_model_is_tuned_on_more_gpus_too(model: str, gpus: int, scheme: str | None, key: str) -> None:
    least = min(FINETUNING[model][key])
    tuned = ENTRIES[model].load().finetune_recipe(peft_scheme=scheme)  # type: ignore[attr-defined]
    if scheme == "qlora" and tuned.model.config.num_moe_experts:
        assert "the experts of a mixture are not stored in 4 bits" in "\n".join(plan(tuned).problems)
        return
    if gpus >= least:
        fitting(model, scheme, num_gpus_per_node=gpus)
    elif gpus == 8:
        fitting(model, scheme, num_nodes=-(-least // 8), num_gpus_per_node=8)
