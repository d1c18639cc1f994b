"""What is said of every field: to a reader, a shell and an editor."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from fiddlehead.recipe import fields
from fiddlehead.recipe.fields import Field, executor_fields, known_fields, recipe_fields
from fiddlehead.recipe.json_schema import recipe_schema
from fiddlehead.recipe.plain import plain_recipe
from fiddlehead.recipe.reference import reference

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests/recipes/golden").glob("*.yaml"))


@pytest.fixture(scope="module")
def found() -> list[Field]:
    return [*recipe_fields(), *executor_fields()]


@pytest.fixture(scope="module")
def checked() -> jsonschema.Draft202012Validator:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    ("path", "owner", "type", "default", "resumable", "allowed"),
    [
        ("model.compile", "LanguageModel", "'layers' | 'model' | None", "None", True, ["layers", "model", "None"]),
        ("optim.lr", "Muon", "float", "0.0003", False, []),
        ("data.allow_changed", "PreTrainingDataModule", "bool", "False", False, ["true", "false"]),
        ("trainer.max_steps", "Trainer", "int", "-1", True, []),
        ("log.name", "Log", "str | None", "None", True, []),
        ("executor.time", "slurm", "str", "'01:00:00'", True, []),
        ("executor.image", "docker", "str", "", True, []),
    ],
)
def test_a_field_is_as_the_code_declares_it(found, path, owner, type, default, resumable, allowed) -> None:
    (field,) = [each for each in found if (each.path, each.owner) == (path, owner)]
    assert (field.type, field.default, field.resumable, field.allowed) == (type, default, resumable, allowed)
    assert field.doc


def test_a_field_of_several_parts_is_said_of_each_and_no_part_is_below_itself(found) -> None:
    assert {each.owner for each in found if each.path == "optim.lr"} == {"AdamW", "Muon"}
    assert {each.owner for each in found if each.path == "executor.python"} == {"local", "slurm", "docker"}
    assert not [each.path for each in found if each.path.startswith(("optim.lr_scheduler.config", "model.model"))]
    assert len({(each.path, each.owner) for each in found}) == len(found)


def test_every_setting_of_ours_says_what_it_means(found) -> None:
    silent = [f"{each.owner}: {each.path}" for each in found if not each.doc and "." in each.path]
    assert silent == []


def test_fields_are_read_from_the_cache_until_a_source_changes(found, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(fields, "recipe_fields", lambda: iter(found))
    monkeypatch.setattr(fields, "executor_fields", lambda: iter(()))
    assert known_fields() == found
    monkeypatch.setattr(fields, "recipe_fields", lambda: iter(()))
    assert known_fields() == found
    (file,) = tmp_path.glob("fields-*.json")
    file.write_text("[{]")
    assert known_fields() == []
    monkeypatch.setattr(fields, "__version__", "next")
    monkeypatch.setattr(fields, "recipe_fields", lambda: iter(found))
    assert known_fields() == found and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setenv("FIDDLEHEAD_CACHE", "/proc/nowhere")
    assert known_fields() == found


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_every_recipe_that_we_write_fits_the_schema(file: Path, checked) -> None:
    assert [error.message for error in checked.iter_errors(plain_recipe(file))] == []


@pytest.mark.parametrize(
    ("path", "value", "fits"),
    [
        ("optim.lrr", 0.1, False),
        ("optim.lr", "fast", False),
        ("model.config.num_layer", 3, False),
        ("model.config.num_layers", 2.5, False),
        ("model.compile", "layer", False),
        ("model.compile", None, True),
        ("model.lora", {"_target_": "fiddlehead.models:LoRA", "rank": 4}, True),
        ("model.lora", {"_target_": "fiddlehead.models:LoRA", "rnk": 4}, False),
        ("optim.lr_scheduler", {"_target_": "mine:Schedule", "anything": 4}, True),
        ("optim.lr_scheduler", {"_target_": "fiddlehead.training:WarmupStableDecay", "min_lr": 0.0}, True),
        ("optim.betas", [0.9, 0.95], True),
        ("optim.betas", [0.9], False),
        ("trainer.strategy", "auto", True),
        ("trainer.default_root_dir", "s3://bucket", False),
        ("trainer.callbacks", [{"_target_": "lightning.pytorch.callbacks:Timer"}], True),
        ("sed", 1, False),
    ],
)
def test_a_typing_error_in_a_recipe_is_seen_by_the_schema(path, value, fits, checked) -> None:
    recipe = plain_recipe(ROOT / "tests/recipes/golden/tiny.yaml")
    *above, last = path.split(".")
    part = recipe
    for name in above:
        part = part[name]
    part[last] = value
    assert checked.is_valid(recipe) is fits


def test_the_reference_page_is_what_the_code_says(found) -> None:
    page = ROOT / "docs/reference.md"
    assert page.read_text() == reference(found), "write it anew: fiddlehead schema --reference > docs/reference.md"
