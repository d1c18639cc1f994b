"""Missing and null fields of a `config.json` mean the same as in transformers, for every family."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddlehead.checkpoints.huggingface.families import FAMILIES
from fiddlehead.checkpoints.huggingface.files import HuggingFaceCheckpoint
from fiddlehead.checkpoints.weights import load_transformer
from fiddlehead.errors import ConfigError
from tests.models.hf_families import FAMILIES as THEIRS
from tests.models.hf_families import random_model, transformers

Fields = dict[str, Any]
MADE = [name for name in THEIRS if name not in ("llama_mha", "llama_mqa", "qwen3_moe_unnormed")]


def theirs(settings: Fields) -> Fields | None:
    """All fields of the configuration that transformers makes of these; None if it makes none."""
    fields = json.loads(json.dumps(settings))
    try:
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields).to_dict()
    except Exception:  # of many kinds
        return None


def ours(settings: Fields) -> Fields | None:
    """The model that it describes; None if it is refused."""
    try:
        return asdict(FAMILIES[settings["model_type"]].config(settings))
    except ConfigError:
        return None


def full(name: str) -> Fields:
    fields = THEIRS[name]().to_dict()
    return {key: value for key, value in fields.items() if key in READ[fields["model_type"]]}


READ = {
    name: {*family.defaults, *family.required, *family.aliases, "model_type", "dtype", "partial_rotary_factor"}
    for name, family in FAMILIES.items()
}


@pytest.mark.parametrize("name", MADE)
def test_a_field_left_out_or_null_is_what_transformers_makes_of_it(name: str) -> None:
    settings = full(name)
    for key in settings.keys() - {"model_type"}:
        without = {other: value for other, value in settings.items() if other != key}
        for changed in (without, settings | {key: None}):
            expected = theirs(changed)
            if expected is not None:
                assert ours(changed) == ours(expected), key
            elif changed is not without:
                assert ours(changed) is None, f"{key}=null"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_without_any_field_is_the_default_one_of_transformers(model_type: str) -> None:
    default = theirs({"model_type": model_type})
    assert default is not None
    assert ours({"model_type": model_type}) == ours(default) != None  # noqa: E711
    assert READ[model_type] >= {*FAMILIES[model_type].settings}, "each field that is read has a default"
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    tiny = {"model_type": model_type, layers: 7, "vocab_size": 61}
    assert ours(tiny) == ours(theirs(tiny) or {})


@pytest.mark.parametrize("name", [name for name in MADE if name != "gpt2"])
def test_the_older_form_of_the_rotary_positions_is_read_as_the_newer(name: str) -> None:
    settings = full(name)
    older = {key: value for key, value in settings.items() if key not in ("rope_parameters", "dtype")}
    older["torch_dtype"] = settings["dtype"]
    rope = dict(settings["rope_parameters"])
    if local := rope.get("sliding_attention"):
        older["rope_local_base_freq"], rope = local["rope_theta"], dict(rope["full_attention"])
    older |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    kind = "rope_type" if local else "type"
    older["rope_scaling"] = None if rope["rope_type"] == "default" else rope | {kind: rope.pop("rope_type")}
    assert ours(older) == ours(settings)
    for key in older.keys() & {"rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor"}:
        without = {other: value for other, value in older.items() if other != key}
        assert ours(without) == ours(theirs(without) or {}), key


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma2", {"rms_norm_eps": None}, "rms_norm_eps: is null, and must have a value; left out, it is 1e-06"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': must be a number"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
        ("gemma2", {"num_hidden_layers": 3.0}, "num_hidden_layers=3.0: must be a whole number"),
        ("llama", {"rope_parameters": "yarn"}, "rope_parameters='yarn': must be an object"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor=None: must be a number"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor=None"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor=None"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor=None: must be a list of numbers"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "must be 'default' or 'longrope' in Phi-3",
        ),
        ("phi3", {"sliding_window": 0}, "sliding_window=0: must be a whole number of 1 or more"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear"}}, "have full_attention and sliding_attention"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention: must have rope_type='default'",
        ),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "is called rope_type in Gemma 3"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types: has 2 names; num_hidden_layers=3"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "layer_types: has chunked_attention; allowed: full_"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0: must be above 0"),
        ("qwen3_moe", {"num_experts": 3}, "num_experts=3: is the same setting as num_local_experts=5"),
    ],
)
def test_a_field_that_says_nothing_known_is_refused_by_name(name: str, changes: Fields, said: str) -> None:
    settings = full(name) | changes
    with pytest.raises(ConfigError) as error:
        FAMILIES[settings["model_type"]].config(settings)
    assert said in str(error.value)


@pytest.mark.parametrize(("name", "left_out"), [("llama", "rms_norm_eps"), ("gemma2", "attn_logit_softcapping")])
def test_the_logits_without_a_field_are_those_of_transformers(name: str, left_out: str, tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: v for key, v in json.loads(file.read_text()).items() if key != left_out}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.randint(1, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(ids).logits, load_transformer(HuggingFaceCheckpoint.open(tmp_path)).eval()(ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
