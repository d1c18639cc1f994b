"""Import and export of Hugging Face checkpoints: refusals and their messages, additional files, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddlehead.checkpoints.folder import TEMPORARY, verify, write_folder, write_state
from fiddlehead.checkpoints.grouped_query import convert_gqa
from fiddlehead.checkpoints.huggingface.convert import export_checkpoint, import_checkpoint
from fiddlehead.data import ByteTokenizer, TokenizerFile
from fiddlehead.data.tokenizers import save_tokenizer
from fiddlehead.errors import ConfigError
from fiddlehead.inference.text import Writer
from fiddlehead.models import Transformer, TransformerConfig
from tests import warm
from tests.data.small_tokenizers import KINDS
from tests.models.hf_families import random_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint as transformers writes it, with a tokenizer."""
    folder = tmp_path / "hf"
    random_model("llama").save_pretrained(folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        import_checkpoint(str(folder), folder.with_name("out"), progress=False)
    assert not folder.with_name("out").exists()
    return str(error.value)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_is_missing_left_over_or_misshaped_is_listed_at_once(llama: Path) -> None:
    tensors = tensors_of(llama)
    tensors["model.layers.0.self_attn.q_prj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    tensors["model.norm.weight"] = torch.ones(47)
    save_file(tensors, llama / "model.safetensors")
    said = refused(llama)
    assert "model.layers.0.self_attn.q_proj.weight [72, 48]: is missing; the nearest there: " in said
    assert "model.layers.0.self_attn.q_prj.weight [72, 48]: is not part of such a model" in said
    assert "model.norm.weight: is [47], and config.json makes it [48]" in said


def test_more_layers_than_there_are_is_refused_in_twenty_lines(llama: Path) -> None:
    change(llama, num_hidden_layers=40)
    said = refused(llama)
    assert "model.layers.3.input_layernorm.weight [48]: is missing" in said
    assert len(said.splitlines()) == 22 and "and 313 more" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "lama"}, "model_type='lama': unknown family 'lama'; did you mean 'llama'?"),
        ({"model_type": "mamba"}, "unknown family 'mamba'"),
        ({"model_type": None}, "model_type=None: names no family of models; set it to one of llama, "),
        ({"hidden_act": "relu"}, "hidden_act='relu': must be 'silu'"),
        ({"attention_bias": True}, "attention_bias=True: must be the same as mlp_bias=False"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "unknown kind of rotary positions 'dynamic'"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized weights are not read"),
        ({"num_attention_heads": 7}, "num_query_groups=3: does not divide num_attention_heads=7"),
        ({"vocab_size": None}, "vocab_size: is null, and must have a value; left out, it is 32000"),
    ],
)
def test_settings_that_no_model_here_has_are_refused(llama: Path, settings: dict[str, Any], said: str) -> None:
    change(llama, **settings)
    assert said in refused(llama)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"")
    said = refused(llama)
    assert "has only pickled weights (pytorch_model.bin)" in said and "save_pretrained('CONVERTED')" in said


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    second = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    second.unlink()
    assert f"{second.name}: is missing" in refused(tmp_path / "hf")


def test_a_file_that_is_cut_short_is_refused(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "bytes, and its header says" in refused(llama)
    file.write_bytes(b"\xff" * 100)
    assert "is not a safetensors file" in refused(llama)


def test_a_head_beside_tied_embeddings_must_be_the_same(tmp_path: Path) -> None:
    random_model("llama_tied_biased").save_pretrained(tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "hf/model.safetensors")
    assert "lm_head.weight: differs from model.embed_tokens.weight" in refused(tmp_path / "hf")
    both = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | both, tmp_path / "hf/model.safetensors")
    import_checkpoint(str(tmp_path / "hf"), tmp_path / "out", progress=False)


def test_a_body_without_the_prefix_of_the_whole_is_read(tmp_path: Path) -> None:
    """GPT-2's own files have it so, and masks among the parameters."""
    random_model("gpt2").save_pretrained(tmp_path / "hf")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path / "hf").items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "hf" / "model.safetensors")
    import_checkpoint(str(tmp_path / "hf"), tmp_path / "out", progress=False)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "a/b/c"])
def test_a_missing_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        import_checkpoint(name, tmp_path / "out", progress=False)


def test_the_tokenizer_and_its_template_travel_along(llama: Path, tmp_path: Path) -> None:
    import_checkpoint(str(llama), tmp_path / "ours", progress=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()


def stops(folder: Path) -> list[int]:
    """What transformers stops at with the model in a folder."""
    import transformers

    kind = transformers.GenerationConfig if (folder / "generation_config.json").is_file() else transformers.AutoConfig
    ids = kind.from_pretrained(folder).eos_token_id
    return ids if isinstance(ids, list) else [ids]


def test_what_ends_a_text_travels_along(llama: Path, tmp_path: Path) -> None:
    asked = {"eos_token_id": [256, 10, 7], "temperature": 0.6, "do_sample": True}
    (llama / "generation_config.json").write_text(json.dumps(asked))
    change(llama, eos_token_id=[256, 10])
    import_checkpoint(str(llama), tmp_path / "ours", progress=False)
    convert_gqa(tmp_path / "ours", tmp_path / "pooled", 1)
    for made in ("ours", "pooled"):
        assert Writer.open(tmp_path / made).tokenizer.stop_ids == [256, 10, 7]
        export_checkpoint(tmp_path / made, tmp_path / f"{made}-back", progress=False)
        assert json.loads((tmp_path / f"{made}-back" / "generation_config.json").read_text()) == asked
        assert stops(tmp_path / f"{made}-back") == [256, 10, 7]


def test_a_run_s_tokenizer_and_what_ends_its_texts_are_exported(llama: Path, tmp_path: Path) -> None:
    """The run began with an imported model, and its folder names one end more."""
    (llama / "generation_config.json").write_text('{"eos_token_id": [256, 10], "temperature": 0.6, "do_sample": true}')
    import_checkpoint(str(llama), tmp_path / "ours", progress=False)
    run = tmp_path / "run"
    with write_folder(run / "checkpoints" / "step-00000001") as folder:
        tensors = load_file(tmp_path / "ours" / "model.safetensors")
        save_file(tensors, folder / "model.safetensors")
        state = json.loads((tmp_path / "ours" / "state.json").read_text())
        kept = {"config": state["config"], "step": 1, "val_loss": None, "init_from": str(tmp_path / "ours")}
        write_state(folder, kept)
    save_tokenizer(TokenizerFile(tmp_path / "ours"), run)
    assert Writer.open(run).tokenizer.stop_ids == [256, 10]
    (run / "generation_config.json").write_text('{"eos_token_id": [256, 7, 10]}')
    assert Writer.open(run).tokenizer.stop_ids == [256, 7, 10]
    export_checkpoint(run, tmp_path / "back", progress=False)
    assert stops(tmp_path / "back") == [256, 7, 10]
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_our_own_is_exported_with_the_special_tokens_of_its_tokenizer(kind: str, tmp_path: Path) -> None:
    import transformers

    source = KINDS[kind](tmp_path / "tokenizer")
    tokenizer = TokenizerFile(source)
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=tokenizer.vocab_size, seq_length=32
    )
    tensors = {f"transformer.{name}": p.detach() for name, p in Transformer(config).state_dict().items()}
    with write_folder(tmp_path / "run" / "checkpoints" / "step-00000001") as folder:
        save_file(tensors, folder / "model.safetensors")
        write_state(folder, {"config": asdict(config), "step": 1, "val_loss": None})
    save_tokenizer(tokenizer, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "back", progress=False)
    published = transformers.AutoTokenizer.from_pretrained(source)
    written = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert written.bos_token_id == published.bos_token_id and written.pad_token_id == published.pad_token_id
    assert set(stops(tmp_path / "back")) == set(tokenizer.stop_ids) >= set(stops(source))
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.special_tokens_map == published.special_tokens_map
    assert back.chat_template == published.chat_template


def test_an_export_in_another_dtype_says_so(llama: Path, tmp_path: Path) -> None:
    import_checkpoint(str(llama), tmp_path / "ours", progress=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", dtype="bfloat16", progress=False)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in tensors_of(tmp_path / "back").items():
        assert torch.equal(tensor, tensors_of(llama)[name].bfloat16())
    with pytest.raises(ConfigError, match="dtype='int8': allowed: float32, bfloat16, float16"):
        export_checkpoint(tmp_path / "ours", tmp_path / "other", dtype="int8", progress=False)


def test_another_family_must_have_the_shape(llama: Path, tmp_path: Path) -> None:
    import_checkpoint(str(llama), tmp_path / "ours", progress=False)
    with pytest.raises(ConfigError, match="model_type='qwen3': has no model of this shape; 'llama' has"):
        export_checkpoint(tmp_path / "ours", tmp_path / "back", family="qwen3", progress=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", family="mistral", progress=False)


def test_an_import_that_dies_half_way_leaves_nothing_that_looks_finished(llama: Path, tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from fiddlehead.checkpoints.huggingface import convert
convert.write_state = lambda *_: os._exit(9)
convert.import_checkpoint({str(llama)!r}, Path({str(tmp_path / "out")!r}), progress=False)
"""
    assert warm.run([sys.executable, "-c", program], timeout=120).returncode == 9
    assert not (tmp_path / "out").exists() and (tmp_path / f"{TEMPORARY}out").exists()
    import_checkpoint(str(llama), tmp_path / "out", progress=False)
    verify(tmp_path / "out")
    assert not (tmp_path / f"{TEMPORARY}out").exists()


@pytest.mark.slow
@pytest.mark.long
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A gigabyte of parameters passes through a process that never holds a quarter of it."""
    config = TransformerConfig(
        num_layers=8, hidden_size=1024, ffn_hidden_size=8192, num_attention_heads=16, num_query_groups=4,
        vocab_size=32000, seq_length=64,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {f"transformer.{name}": tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    size = 4 * sum(shape.numel() for shape in shapes.values())
    assert size > 1.0e9
    numbers = torch.arange(1 << 25, dtype=torch.float32)  # random ones would take seconds; each tensor has its own
    content = {name: numbers[: shape.numel()].view(shape) + place for place, (name, shape) in enumerate(shapes.items())}
    with write_folder(tmp_path / "ours") as folder:
        save_file(content, folder / "model.safetensors")
        write_state(folder, {"config": asdict(config), "step": 0, "val_loss": None})
    del numbers, content
    program = f"""
import resource
from pathlib import Path
from fiddlehead.checkpoints.huggingface.convert import export_checkpoint, import_checkpoint
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_checkpoint({str(tmp_path / "ours")!r}, Path({str(tmp_path / "hf")!r}), shard_bytes=300_000_000, progress=False)
import_checkpoint({str(tmp_path / "hf")!r}, Path({str(tmp_path / "back")!r}), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < size / 4
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 4
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
