"""A user can add a family with one file in the project."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddlehead.checkpoints.huggingface import families
from fiddlehead.checkpoints.huggingface.convert import export_checkpoint, import_checkpoint
from fiddlehead.checkpoints.weights import load_transformer, open_weights
from fiddlehead.errors import ConfigError
from tests.models.hf_families import random_model

PROJECT = """
from fiddlehead.checkpoints.huggingface import families

FAMILY = families.Family(
    model_type="my_model",
    architecture="MyModelForCausalLM",
    modules={**families.LLAMA_MODULES, "embedding": "model.tokens"},
    settings={name.replace("num_hidden_layers", "n_layers"): field for name, field in families.SETTINGS.items()},
)
families.register(FAMILY)
"""


@pytest.fixture(autouse=True)
def same_families_after() -> Iterator[None]:
    before = dict(families.FAMILIES)
    yield
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


def test_a_file_in_a_project_adds_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = random_model("llama")
    theirs.save_pretrained(tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    settings["model_type"], settings["n_layers"] = "my_model", settings.pop("num_hidden_layers")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.tokens.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConfigError, match="unknown family 'my_model'"):
        import_checkpoint(str(tmp_path / "hf"), tmp_path / "ours", progress=False)

    (tmp_path / "my_family.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    family = importlib.import_module("my_family").FAMILY

    import_checkpoint(str(tmp_path / "hf"), tmp_path / "ours", progress=False)
    ids = torch.arange(1, 14)[None]
    with torch.no_grad():
        expected, found = theirs(ids).logits, load_transformer(open_weights(tmp_path / "ours")).eval()(ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert export_checkpoint(tmp_path / "ours", tmp_path / "back", progress=False) is family
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()


def test_a_family_of_fiddlehead_is_not_replaced_and_a_users_own_is() -> None:
    with pytest.raises(ConfigError, match="model_type='llama': is a family of fiddlehead"):
        families.register(families.Family(model_type="llama", architecture="Other"))
    for architecture in ("First", "Second"):
        families.register(families.Family(model_type="my_model", architecture=architecture))
        assert families.FAMILIES["my_model"].architecture == architecture
    assert list(families.FAMILIES)[-1] == "my_model", "the built-in families are preferred for an export"


def test_a_family_names_only_fields_that_there_are() -> None:
    with pytest.raises(ConfigError) as error:
        families.Family(model_type="m", architecture="M", settings={"n": "num_layer"}, fixed={"add_bias": True})
    assert (
        "family 'm': settings='num_layer': unknown field of TransformerConfig 'num_layer'; did you mean 'num_layers'"
        in str(error.value)
    )
    assert "'add_bias'" in str(error.value)


def test_a_setting_that_has_no_default_must_be_there() -> None:
    with pytest.raises(ConfigError, match="hidden_size: is missing"):
        families.Family(model_type="m", architecture="M").config({"model_type": "m"})
