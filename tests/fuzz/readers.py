"""Every reader of foreign files: how to make a valid file for it, and how to read it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors
import torch

from fiddlehead.checkpoints import folder as checkpoint_folder
from fiddlehead.checkpoints.huggingface.families import FAMILIES
from fiddlehead.checkpoints.huggingface.files import HuggingFaceCheckpoint
from fiddlehead.checkpoints.huggingface.tensor_map import tensor_map
from fiddlehead.checkpoints.nemo.context import Context
from fiddlehead.checkpoints.nemo.distributed import read_distributed
from fiddlehead.checkpoints.nemo.tensor_map import MegatronTensors
from fiddlehead.checkpoints.safetensors_files import LazyTensor, lazy_tensors, read_header, write_file
from fiddlehead.checkpoints.weights import CheckpointWeights
from fiddlehead.data import ByteTokenizer
from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.megatron import MegatronTokens
from fiddlehead.data.readers import parse, read_blocks
from fiddlehead.data.records import read_records
from fiddlehead.data.token_file import SPLITS, TokenFile
from fiddlehead.data.token_writer import TokenDatasetWriter
from fiddlehead.data.tokenizers import TokenizerFile
from fiddlehead.models import TransformerConfig
from fiddlehead.models.transformer import Transformer
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.catalog import find_part
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes.tiny import tiny
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, StopRequest
from tests.checkpoints.nemo.megatron import settings as nemo_settings
from tests.checkpoints.nemo.megatron import tensors as nemo_tensors
from tests.checkpoints.nemo.megatron import write as write_nemo
from tests.data.small_tokenizers import QWEN_TEMPLATE, save_llama2, save_qwen
from tests.data.test_megatron import write as write_megatron
from tests.models.hf_families import random_model

_JINJA = "chat_template.jinja"
MESSAGES = [{"role": "user", "content": "Fern?"}, {"role": "assistant", "content": "A plant."}]
SHAPE = TransformerConfig(
    num_layers=2, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=6, vocab_size=11,
    seq_length=16,
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """One way into the package for a foreign file."""

    make: Callable[[Path], Any]
    """Writes a valid folder."""
    file: str
    """The file in it that is damaged."""
    read: Callable[[Path], Any]
    """Reads the folder."""
    kind: Literal["json", "lines", "bytes", "header", "text"] = "json"
    """How it is damaged: JSON values, those of each line or of a safetensors header are replaced too."""


def _safetensors(folder: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.empty(0, 2)}
    write_file(folder / "model.safetensors", lazy_tensors(tensors))


def _read_safetensors(folder: Path) -> None:
    """What is read here, the library reads too."""
    file = folder / "model.safetensors"
    found = read_header(file)
    with safetensors.safe_open(file, "pt") as theirs:
        assert set(theirs.keys()) == set(found)
        for name, stored in found.items():
            ours = stored.load()
            assert ours.shape == theirs.get_tensor(name).shape and ours.dtype == theirs.get_tensor(name).dtype


def _family(model_type: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        family = FAMILIES[model_type]
        config = SHAPE
        if model_type == "gpt2":
            config = replace(SHAPE, num_query_groups=None)
        experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 6} if "num_local_experts" in family.settings else {}
        window = {"window_size": (3, 0)} if model_type == "gpt_oss" or "gemma" in model_type else {}
        config = replace(config, **{**window, **experts, **family.fixed})
        if "gemma" in model_type:
            config = replace(config, embedding_multiplier=config.hidden_size**0.5)
        settings = family.config_json(config)
        config = family.config(settings)
        theirs = dict(pair for each in tensor_map(family, config) for pair in each.theirs)
        tensors = {name: LazyTensor("F32", shape, _zeros(shape)) for name, shape in theirs.items()}
        write_file(folder / "model-00001-of-00001.safetensors", tensors)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(theirs, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(settings))

    return make


def _zeros(shape: tuple[int, ...]) -> Callable[[], list[memoryview]]:
    return lambda: [memoryview(bytes(4 * int(np.prod(shape))))]


def _read_tokenizer(folder: Path) -> None:
    tokenizer = TokenizerFile(folder)
    tokenizer.decode(tokenizer.encode("def f(x): return 1"))
    assert tokenizer.begin_ids is not None and tokenizer.fingerprint
    tokenizer.encode_with_special("a</s>")
    tokenizer.token_bytes()


def _read_template(folder: Path) -> None:
    if template := ChatTemplate.load(folder):
        template.render(MESSAGES, add_generation_prompt=True)


def _records(values: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


_MESSAGES = _records([{"messages": MESSAGES}, {"messages": MESSAGES, "tools": []}])
_PAIRS = _records([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
_TEXTS = _records([{"text": "a fern"}, {"text": "moss", "other": 1}])


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


def _parquet(folder: Path) -> None:
    table = pa.table({"text": ["a fern", "moss", None], "messages": [MESSAGES] * 3})
    pyarrow.parquet.write_table(table, folder / "a.parquet")


def _saved_dataset(folder: Path) -> None:
    table = pa.table({"messages": [MESSAGES] * 2})
    with pa.ipc.new_stream(str(folder / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


def _read_texts(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        for block in read_blocks(folder / name, "text"):
            parse(block, "text")

    return read


def _read_records(name: str, preference: bool = False) -> Callable[[Path], Any]:
    return lambda folder: [each.num_bytes for each in read_records([folder / name], preference=preference)]


def _tokens(folder: Path) -> None:
    shutil.rmtree(folder)
    with TokenDatasetWriter(folder, ByteTokenizer(), ["a"]) as writer:
        for split in SPLITS:
            writer.add(split, np.arange(64, dtype=np.uint16), 2, 60)
        writer.finish()


def _read_tokens(folder: Path) -> None:
    for split in SPLITS:
        file = TokenFile(folder, split)
        if len(file):
            file.window(0, 1)
    _ = f"{file.info.vocab_size + file.info.eos_id:,}"
    file.info.open_tokenizer(folder)


def _recipe(folder: Path) -> None:
    tiny().save(folder / "recipe.yaml")


def _read_recipe(folder: Path) -> None:
    recipe = Recipe.load(folder / "recipe.yaml")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


OVERRIDES = ["trainer.max_steps=10", "model.config.hidden_size*=2", "optim.betas=[0.9, 0.95]", "log.name='a'"]
OVERRIDES += ["optim.lr_scheduler=WarmupStableDecay(warmup_steps=2)", "data.paths=[a, b]", "trainer.devices+=1"]


def _read_overrides(folder: Path) -> None:
    text = (folder / "overrides.txt").read_text(errors="replace")
    for line in text.split("\n"):
        apply_overrides(tiny(), [line], find=find_part)


def _run(folder: Path) -> None:
    run = RunDirectory(folder)
    _recipe(folder)
    run.write_status(Status(State.FAILED, host="a", pid=1, process_started=2, exit_code=1))
    run.request_stop(StopRequest("a", True))
    run.metrics.write_text("step,loss\n1,2.5\n2,2.25\n")


def _read_run(folder: Path) -> None:
    run = RunDirectory(folder)
    if status := run.status():
        _ = f"{status.state.ended} {status.pid:d} {status.attempt + 1} {status.started:.1f} {status.reason.strip()}"
    if stop := run.stop_request():
        _ = stop.reason.strip()
    run.last_metrics()
    run.last_step()


def _checkpoint(folder: Path) -> None:
    parameters = {f"transformer.{name}": tensor for name, tensor in Transformer(SHAPE).state_dict().items()}
    write_file(folder / "model.safetensors", lazy_tensors(parameters))
    checkpoint_folder.write_state(folder, {"config": asdict(SHAPE), "step": 1, "val_loss": None})


def _read_checkpoint(folder: Path) -> None:
    CheckpointWeights.open(folder)


def _read_forged_checkpoint(folder: Path) -> None:
    """As someone who forges a checkpoint, with a checksum that is right."""
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text())
        state.pop("crc32", None)
        file.write_text(json.dumps(state | {"crc32": checkpoint_folder._state_crc32(state)}))
    except (ValueError, RecursionError, TypeError, AttributeError):
        pass
    CheckpointWeights.open(folder)


def _megatron(folder: Path) -> None:
    write_megatron(folder / "text", "uint16")


def _read_megatron(folder: Path) -> Any:
    tokens = MegatronTokens(folder / "text", 0, 4, eos_id=0)
    return tokens.ends([0], tokens.windows([0], len(tokens)))


def _nemo(folder: Path) -> None:
    model = random_model("llama")
    write_nemo(folder, nemo_tensors(model), nemo_settings(model))


def _read_nemo(folder: Path) -> Any:
    weights = folder / "weights"
    tensors = MegatronTensors(weights, read_distributed(weights))
    config, adds_one = Context.read(folder).config(tensors, {}, None)
    return [each.load() for each in tensors.mapped(config, adds_one=adds_one)]


READERS: dict[str, Reader] = {
    "safetensors": Reader(_safetensors, "model.safetensors", _read_safetensors, "header"),
    **{f"config-{name}": Reader(_family(name), "config.json", HuggingFaceCheckpoint.open) for name in FAMILIES},
    "index": Reader(_family("llama"), "model.safetensors.index.json", HuggingFaceCheckpoint.open),
    "shard": Reader(_family("llama"), "model-00001-of-00001.safetensors", HuggingFaceCheckpoint.open, "header"),
    "tokenizer-bpe": Reader(save_qwen, "tokenizer.json", _read_tokenizer),
    "tokenizer-unigram": Reader(save_llama2, "tokenizer.json", _read_tokenizer),
    "tokenizer-config": Reader(
        save_qwen,
        "tokenizer_config.json",
        lambda folder: (_read_tokenizer(folder), _read_template(folder)),
    ),
    "generation-config": Reader(save_qwen, "generation_config.json", _read_tokenizer),
    "template": Reader(_file(_JINJA, QWEN_TEMPLATE.encode()), _JINJA, _read_template, "text"),
    "text": Reader(_file("a.txt", "a fern ß".encode()), "a.txt", _read_texts("a.txt"), "bytes"),
    "lines": Reader(_file("a.jsonl", _TEXTS), "a.jsonl", _read_texts("a.jsonl"), "lines"),
    "lines-gz": Reader(_file("a.jsonl.gz", gzip.compress(_TEXTS)), "a.jsonl.gz", _read_texts("a.jsonl.gz"), "bytes"),
    "parquet": Reader(_parquet, "a.parquet", _read_texts("a.parquet"), "bytes"),
    "examples": Reader(_file("a.jsonl", _MESSAGES), "a.jsonl", _read_records("a.jsonl"), "lines"),
    "examples-array": Reader(
        _file("a.json", json.dumps([{"messages": MESSAGES}]).encode()), "a.json", _read_records("a.json")
    ),
    "pairs": Reader(_file("a.jsonl", _PAIRS), "a.jsonl", _read_records("a.jsonl", True), "lines"),
    "examples-parquet": Reader(_parquet, "a.parquet", _read_records("a.parquet"), "bytes"),
    "saved-dataset": Reader(_saved_dataset, "state.json", _read_records("")),
    "saved-rows": Reader(_saved_dataset, "data.arrow", _read_records(""), "bytes"),
    "token-dataset": Reader(_tokens, "meta.json", _read_tokens),
    "tokens": Reader(_tokens, "train.bin", _read_tokens, "bytes"),
    "megatron-index": Reader(_megatron, "text.idx", _read_megatron, "bytes"),
    "nemo-metadata": Reader(_nemo, "weights/.metadata", _read_nemo, "bytes"),
    "nemo-tensors": Reader(_nemo, "weights/__0_0.distcp", _read_nemo, "bytes"),
    "nemo-context": Reader(_nemo, "context/model.yaml", _read_nemo, "text"),
    "recipe": Reader(_recipe, "recipe.yaml", _read_recipe, "text"),
    "overrides": Reader(
        _file("overrides.txt", "\n".join(OVERRIDES).encode()), "overrides.txt", _read_overrides, "text"
    ),
    "status": Reader(_run, "status", _read_run),
    "stop": Reader(_run, "stop", _read_run),
    "metrics": Reader(_run, "metrics.csv", _read_run, "text"),
    "checkpoint": Reader(_checkpoint, "state.json", _read_checkpoint),
    "forged-checkpoint": Reader(_checkpoint, "state.json", _read_forged_checkpoint),
}
