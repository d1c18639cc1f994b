"""The files of a Hugging Face folder that are read are exactly those that transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddlehead.checkpoints.huggingface.convert import export_checkpoint, find_checkpoint, import_checkpoint
from fiddlehead.checkpoints.huggingface.files import HuggingFaceCheckpoint
from fiddlehead.checkpoints.safetensors_files import read_header
from fiddlehead.checkpoints.weights import find_weights
from fiddlehead.errors import ConfigError
from tests.models.hf_families import random_model, transformers

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `one` and `many`, the same model in one file and in several, and `other`, another model."""
    folder, model = tmp_path_factory.mktemp("saved"), random_model("llama")
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="60KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    model.save_pretrained(folder / "other")
    model.save_pretrained(folder / "shards", max_shard_size="90KB")
    return folder


def change(file: Path, changed: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    changed(values)
    file.write_text(json.dumps(values))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def newer_file(saved: Path, folder: Path) -> None:
    shutil.copy(saved / "other" / "model.safetensors", folder)


def strays(saved: Path, folder: Path) -> None:
    for name in ("old_model", "consolidated", "adapter_model", "model.fp16"):
        shutil.copy(saved / "other" / "model.safetensors", folder / f"{name}.safetensors")
    for file in shards(saved / "shards"):
        shutil.copy(file, folder)


def unlisted(saved: Path, folder: Path) -> None:
    change(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))


def listed_elsewhere(saved: Path, folder: Path) -> None:
    last = shards(folder)[-1].name
    change(folder / INDEX, lambda index: index["weight_map"].update({"model.embed_tokens.weight": last}))


def in_a_folder(saved: Path, folder: Path) -> None:
    (folder / "parts").mkdir()
    for file in shards(folder):
        file.rename(folder / "parts" / file.name)
    inside = lambda index: {name: f"parts/{file}" for name, file in index["weight_map"].items()}  # noqa: E731
    change(folder / INDEX, lambda index: index.update(weight_map=inside(index)))


def named_in_config(saved: Path, folder: Path) -> None:
    shutil.copy(saved / "other" / "model.safetensors", folder / "second.safetensors")
    change(folder / "config.json", lambda config: config.update(transformers_weights="second.safetensors"))


@pytest.mark.parametrize(
    ("base", "changed", "unread"),
    [
        ("one", strays, 7),
        ("many", newer_file, 4),
        ("many", strays, 7),
        ("many", unlisted, 0),
        ("many", listed_elsewhere, 0),
        ("many", in_a_folder, 0),
        ("one", named_in_config, 1),
    ],
)
def test_the_files_are_those_that_transformers_loads(
    base: str, changed: Callable[[Path, Path], None], unread: int, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / base, folder := tmp_path / "hf")
    changed(saved, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = HuggingFaceCheckpoint.open(folder)
    for name, stored in ours.tensors.items():
        assert torch.equal(stored.load(), theirs[name]), name
    assert len(ours.unread) == unread


def no_index(saved: Path, folder: Path) -> None:
    (folder / INDEX).unlink()


def another_name(saved: Path, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def adapters_too(saved: Path, folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')


def adapters_alone(saved: Path, folder: Path) -> None:
    adapters_too(saved, folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def twice(saved: Path, folder: Path) -> None:
    first, *_, last = shards(folder)
    tensors = load_file(last) | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"] * 2}
    save_file(tensors, last)


def absent(saved: Path, folder: Path) -> None:
    first = shards(folder)[0].name
    change(folder / INDEX, lambda index: index["weight_map"].update({"model.extra.weight": first}))


def removed(saved: Path, folder: Path) -> None:
    tensors = load_file(last := shards(folder)[-1])
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, last)


def outside(saved: Path, folder: Path) -> None:
    elsewhere = {"model.norm.weight": "../one/model.safetensors"}
    change(folder / INDEX, lambda index: index["weight_map"].update(elsewhere))


def no_map(saved: Path, folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": ["model.safetensors"]}')


def config_outside(saved: Path, folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update(transformers_weights="../other/model.safetensors"))


def config_list(saved: Path, folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("base", "changed", "said"),
    [
        (
            "many",
            no_index,
            f"has no model.safetensors and no {INDEX}, and transformers does not load model-00001-of-00004",
        ),
        ("one", another_name, "transformers does not load weights.safetensors"),
        ("one", adapters_too, "adapter_config.json: the folder has adapters for 'owner/base', not a whole model"),
        ("one", adapters_alone, "adapter_config.json: the folder has adapters for 'owner/base', not a whole model"),
        ("many", twice, "model.embed_tokens.weight: is in "),
        ("many", absent, f"{INDEX}: model.extra.weight is in none of the files that it lists"),
        ("many", removed, f"{INDEX}: model.norm.weight is in none of the files that it lists"),
        ("many", outside, f"{INDEX}: '../one/model.safetensors' is not in the folder"),
        ("many", no_map, f"{INDEX}: weight_map must say for each tensor which file has it"),
        ("one", config_outside, "transformers_weights: '../other/model.safetensors' is not in the folder"),
        ("one", config_list, "config.json: must hold a JSON object"),
    ],
)
def test_a_folder_that_is_not_one_model_is_refused_by_name(
    base: str, changed: Callable[[Path, Path], None], said: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / base, folder := tmp_path / "hf")
    changed(saved, folder)
    with pytest.raises(ConfigError) as error:
        HuggingFaceCheckpoint.open(find_weights(folder))
    assert said in str(error.value)


def test_a_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; name its folder"):
        find_checkpoint(str(saved / "one" / "model.safetensors"))


def test_what_is_exported_does_not_ask_for_the_files_that_were_imported(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "one", folder := tmp_path / "hf")
    named_in_config(saved, folder)
    import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", progress=False)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_pointer_of_git_lfs_is_named_as_what_it_is(tmp_path: Path) -> None:
    """It is what `git clone` leaves without git-lfs."""
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4cac19622fc3ada9\nsize 988097824\n")
    with pytest.raises(ConfigError, match=r"is a pointer of Git LFS; `git lfs pull` fetches the file$"):
        read_header(file)
