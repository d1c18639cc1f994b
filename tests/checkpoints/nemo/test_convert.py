"""Checkpoints of NeMo 2.0: what is imported computes what the model of transformers does that was written so."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fiddlehead.checkpoints.huggingface.convert import export_checkpoint
from fiddlehead.checkpoints.nemo.convert import import_nemo
from fiddlehead.checkpoints.weights import CheckpointWeights, load_transformer, open_weights
from fiddlehead.cli.checkpoints import importing
from fiddlehead.data import ByteTokenizer
from fiddlehead.errors import ConfigError
from tests.checkpoints.nemo.megatron import settings, tensors, write
from tests.models.hf_families import DEFAULT, LAYERS, SHAPE, random_model, transformers

IDS = torch.randint(1, 61, (2, 13), generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def imported(folder: Path, source: Path, **options: Any) -> torch.Tensor:
    import_nemo(source, folder, progress=False, **options)
    return load_transformer(open_weights(folder)).eval()(IDS)


def nemotron() -> Any:
    """LayerNorm with weights around 0, squared ReLU, half of each head's channels rotated."""
    shape = {name: value for name, value in SHAPE.items() if name != "rms_norm_eps"}
    rope = DEFAULT | {"partial_rotary_factor": 0.5}
    config = transformers.NemotronConfig(**(shape | {"head_dim": 8, "norm_eps": 1e-3, "rope_parameters": rope}))
    model = transformers.NemotronForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def made(name: str) -> Any:
    return nemotron() if name == "nemotron" else random_model(name)


def nemo(folder: Path, model: Any, changes: dict[str, Any] | None = None, **layout: Any) -> Path:
    return write(folder, tensors(model, **layout), settings(model, **(changes or {})))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nemo(tmp_path_factory.mktemp("llama") / "nemo", random_model("llama"))


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        import_nemo(folder, folder.with_name("out"), progress=False, **options)
    assert not folder.with_name("out").exists()
    return str(error.value)


STACKED = ["llama", "llama31", "llama_mqa", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "nemotron"]


@pytest.mark.parametrize(
    ("name", "stacked"),
    [*((name, True) for name in STACKED), ("llama_mha", False), ("mixtral", False), ("qwen2", False)],
)
def test_logits_are_those_of_transformers(name: str, stacked: bool, tmp_path: Path) -> None:
    model = made(name)
    source = nemo(tmp_path / "nemo", model, stacked=stacked, changes={"qk_layernorm": name == "qwen3"})
    assert close(imported(tmp_path / "ours", source), model(IDS).logits)


@pytest.mark.parametrize(
    "pattern",
    [
        "mlp.experts.local_experts.{expert}.{linear}.weight",
        "mlp.experts.{linear}.weight{expert}",
        "mlp.experts.experts.{expert}.{linear}.weight",
    ],
)
def test_experts_may_be_tensors_of_their_own(pattern: str, tmp_path: Path) -> None:
    model = random_model("mixtral")
    source = nemo(tmp_path / "nemo", model, stacked="local" not in pattern, experts=pattern)
    assert close(imported(tmp_path / "ours", source), model(IDS).logits)


def test_gate_and_up_may_be_tensors_of_their_own(tmp_path: Path) -> None:
    model = random_model("llama")
    found = tensors(model)
    fused = found.pop("module.decoder.layers.mlp.linear_fc1.weight")
    for half, part in zip("wv", fused.chunk(2, dim=1), strict=True):
        found[f"module.decoder.layers.mlp.linear_fc1.weight_{half}"] = part.clone()
    source = write(tmp_path / "nemo", found, settings(model))
    assert close(imported(tmp_path / "ours", source), model(IDS).logits)


@pytest.mark.parametrize("prefix", ["", "model.", "module.module."])
def test_names_may_begin_otherwise(prefix: str, tmp_path: Path) -> None:
    model = random_model("llama")
    found = {prefix + name.removeprefix("module."): tensor for name, tensor in tensors(model).items()}
    source = write(tmp_path / "nemo", found, settings(model))
    assert close(imported(tmp_path / "ours", source / "weights"), model(IDS).logits)


@pytest.mark.parametrize("known_by", ["settings", "tokenizer", "option", "nothing"])
def test_the_vocabulary_s_padding_is_left_out(known_by: str, tmp_path: Path) -> None:
    model = random_model("llama")
    source = nemo(tmp_path / "nemo", model, {} if known_by == "settings" else {"vocab_size": None}, padding=300)
    if known_by == "tokenizer":
        folder = source / "context/nemo_tokenizer"
        folder.mkdir()
        ByteTokenizer().save(folder / "tokenizer.json")
    given = {"vocab_size": 61} if known_by == "option" else {}
    logits = imported(tmp_path / "ours", source, given=given)
    assert logits.shape[-1] == {"settings": 61, "tokenizer": 257, "option": 61, "nothing": 361}[known_by]
    assert close(logits[..., :61], model(IDS).logits)
    assert (tmp_path / "ours/tokenizer.json").is_file() == (known_by == "tokenizer")


@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_bfloat16_stays_bfloat16(name: str, tmp_path: Path) -> None:
    """But a factor 1 + weight, which would lose digits."""
    model = made(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    stored = {key: tensor.bfloat16() for key, tensor in tensors(model).items()}
    logits = imported(tmp_path / "ours", write(tmp_path / "nemo", stored, settings(model)))
    assert close(logits, model(IDS).logits)
    weights = CheckpointWeights.open(tmp_path / "ours")
    assert weights.dtype("layers.0.mlp.linear_fc1.weight") == "BF16"
    assert weights.dtype("final_layernorm.weight") == ("F32" if name == "nemotron" else "BF16")


def test_an_import_is_exported_to_hugging_face(tmp_path: Path) -> None:
    model = random_model("mistral")
    import_nemo(nemo(tmp_path / "nemo", model), tmp_path / "ours", progress=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "hf", progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert close(again(IDS).logits, model(IDS).logits)


def test_without_a_context_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    model = random_model("llama")
    source = write(tmp_path / "nemo", tensors(model), None)
    said = refused(source)
    asked = ["num_attention_heads", "layernorm_epsilon", "activation", "layernorm_zero_centered_gamma", "rotary_base"]
    assert [line.split("--set ")[-1] for line in said.splitlines()] == [f"{name}=VALUE" for name in asked]
    given = {"num_attention_heads": 12, "layernorm_epsilon": 1e-3, "activation": "swiglu", "rotary_base": 500.0}
    given["layernorm_zero_centered_gamma"] = False
    assert close(imported(tmp_path / "ours", source, given=given), model(IDS).logits)
    assert "unknown field 'num_heads'; did you mean 'num_attention_heads'" in refused(source, given={"num_heads": 1})


def test_what_is_missing_left_over_or_misshaped_is_listed_at_once(tmp_path: Path) -> None:
    model = random_model("llama")
    found = tensors(model)
    stem = "module.decoder.layers."
    found[f"{stem}mlp.linear_fc9.weight"] = found.pop(f"{stem}mlp.linear_fc2.weight")
    found["module.decoder.final_layernorm.weight"] = torch.ones(47)
    found[f"{stem}self_attention.linear_proj.bias"] = torch.ones(LAYERS, 48)
    said = refused(write(tmp_path / "nemo", found, settings(model)))
    assert "decoder.layers.2.mlp.linear_fc2.weight: is missing, for [48, 56]" in said
    assert "mlp.linear_fc9.weight [3, 48, 56]: is not part of such a model; the nearest is" in said
    assert "final_layernorm.weight: is [47], and the settings make it [48]" in said
    assert "linear_proj.bias [3, 48]: is not part of such a model" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 40}, "num_layers=40: the tensors are those of 3"),
        ({"num_moe_experts": 10**9}, "num_moe_experts=1000000000: the tensors are those of None"),
        ({"hidden_size": 10**9}, "hidden_size=1000000000: no tensor is as large; the longest side is"),
        ({"num_attention_heads": 10**9}, "num_attention_heads=1000000000: no tensor is as large"),
        ({"ffn_hidden_size": 10**30}, "no tensor is as large"),
        ({"hidden_size": 50}, "and the settings make it"),
        ({"num_attention_heads": 5}, "model.yaml: "),
        ({"multi_latent_attention": True}, "multi_latent_attention=True is not supported; only False is"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True is not supported"),
        ({"activation_func": {"_target_": "torch.relu"}}, "activation_func='relu': with gated_linear_unit=True is not"),
        ({"normalization": "BatchNorm"}, "unknown value 'BatchNorm'"),
        ({"window_size": 5}, "window_size=5: must be two whole numbers"),
        ({"_target_": "nemo.collections.llm.gpt.model.llama4.Llama4Config"}, "has a Llama4Config, which is not read"),
        ({"_target_": "nemo.collections.llm.gpt.model.ssm.SSMConfig"}, "has a SSMConfig, which is not read"),
    ],
)
def test_settings_that_no_model_here_has_are_refused(
    changes: dict[str, Any], said: str, llama: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(llama, tmp_path / "nemo")
    (source / "context/model.yaml").write_text(yaml.safe_dump(settings(random_model("llama"), **changes)))
    assert said in refused(source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config: !!python/object/apply:os.system ['touch hacked']", "cannot be read"),
        ("- a", "must hold a mapping, not a list"),
        ("[" * 500, "cannot be read"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_context_is_data(text: str, said: str, llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "nemo")
    (source / "context/model.yaml").write_text(text)
    assert said in refused(source)


def test_the_older_io_json_is_read_too(tmp_path: Path) -> None:
    """As Fiddle writes it."""
    model = random_model("llama31")
    source = nemo(tmp_path / "nemo", model)
    config = settings(model)["config"]
    (source / "context/model.yaml").unlink()
    (source / "context/io.json").write_text(json.dumps(fiddle_json(config)))
    assert close(imported(tmp_path / "ours", source), model(IDS).logits)


def fiddle_json(config: dict[str, Any]) -> dict[str, Any]:
    """Fiddle's serialization of a trainer's context with a model of this config."""

    def pyref(name: str) -> dict[str, str]:
        module, _, attribute = name.rpartition(".")
        return {"type": "pyref", "module": module, "name": attribute}

    def value(each: Any) -> Any:
        if isinstance(each, dict):
            return pyref(each["_target_"])
        return {"type": "leaf", "value": each, "paths": []}

    def made(name: str, items: dict[str, Any]) -> dict[str, Any]:
        objects[f"about_{len(objects)}"] = {
            "type": pyref("fiddle._src.config.BuildableTraverserMetadata"),
            "items": [["Attr(name='fn_or_cls')", pyref(name)], ["Attr(name='argument_tags')", value(None)]],
        }
        return {
            "type": pyref("fiddle._src.config.Config"),
            "items": [[f"Attr(name='{key}')", item] for key, item in items.items()],
            "metadata": {"type": "ref", "key": list(objects)[-1]},
        }

    objects: dict[str, Any] = {}
    fields = {name: value(each) for name, each in config.items() if name != "_target_"}
    objects["config"] = made(config["_target_"], fields)
    model = {"config": {"type": "ref", "key": "config"}, "optim": value(None)}
    objects["model"] = made("nemo.collections.llm.gpt.model.llama.LlamaModel", model)
    objects["root"] = made("nemo.lightning.io.pl.TrainerContext", {"model": {"type": "ref", "key": "model"}})
    return {"root": {"type": "ref", "key": "root"}, "objects": objects, "version": "0.0.1"}


def test_checkpoints_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "old.nemo").touch()
    assert "is an archive of NeMo 1.0" in refused(tmp_path / "old.nemo")
    (tmp_path / "zarr/weights/module.embedding").mkdir(parents=True)
    (tmp_path / "zarr/weights/module.embedding/.zarray").touch()
    assert "has zarr arrays, which are not read" in refused(tmp_path / "zarr")
    (tmp_path / "ranks/mp_rank_00").mkdir(parents=True)
    assert "checkpoints of single ranks" in refused(tmp_path / "ranks")
    assert "there is no such folder" in refused(tmp_path / "none")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        import_nemo(tmp_path / "zarr", tmp_path / "out", progress=False)


def test_adapters_alone_are_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    found = tensors(model) | {"module.decoder.layers.mlp.linear_fc1.adapter.linear_in.weight": torch.ones(2, 2)}
    assert "has adapters" in refused(write(tmp_path / "nemo", found, settings(model)))
    only = {"module.vision.weight": torch.ones(2)}
    assert "is not a GPTModel of Megatron-core" in refused(write(tmp_path / "other", only, settings(model)))


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    source = nemo(tmp_path / "nemo", random_model("llama"), {"vocab_size": None}, padding=3)
    command = ["nemo", str(source), "--out", str(tmp_path / "ours")]
    result = CliRunner().invoke(importing, [*command, "--set", "vocab_size=61", "--set", "window_size=[5, 0]"])
    assert result.exit_code == 0, result.output
    assert "3 layers, 12 heads in 3 groups" in result.output and "61 of the 64 rows" in result.output
    assert open_weights(tmp_path / "ours").config.window_size == (5, 0)
    context = yaml.safe_load((source / "context/model.yaml").read_text())
    assert asdict(open_weights(tmp_path / "ours").config)["rotary_base"] == context["config"]["rotary_base"]
