"""Imports and exports Hugging Face checkpoints: file by file, without the whole model in memory or running code.

What is imported is a checkpoint like those of a run, without an optimizer's state, in a folder with its tokenizer:

- `model.safetensors` and `state.json`, as `training.checkpoint` describes them
- `tokenizer.json`, and the other files of the tokenizer as they came
- `huggingface/`: the other files as they came, `config.json` among them, for the way back
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fiddlehead.checkpoints.folder import write_folder, write_state
from fiddlehead.checkpoints.huggingface.families import FAMILIES, Family, family_for, family_of, same_model
from fiddlehead.checkpoints.huggingface.files import HuggingFaceCheckpoint
from fiddlehead.checkpoints.huggingface.tensor_map import MappedTensor, tensor_map
from fiddlehead.checkpoints.safetensors_files import DTYPES, LazyTensor, bytes_of, write_file
from fiddlehead.checkpoints.weights import PREFIX, CheckpointWeights, find_weights, open_weights
from fiddlehead.data.progress import ByteProgress
from fiddlehead.data.special_tokens import SpecialTokens, read_settings, update_settings
from fiddlehead.data.tokenizers import TokenizerFile
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import inside, read_object
from fiddlehead.files.paths import user_path
from fiddlehead.models import TransformerConfig
from fiddlehead.models.lora import save_peft, to_peft

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
OTHER_FILES = ("config.json", "generation_config.json")
SHARD_BYTES = 5 * 10**9


def import_checkpoint(source: str, out: Path, *, progress: bool = True) -> HuggingFaceCheckpoint:
    """Makes a fiddlehead checkpoint, the folder `out`, from a Hugging Face folder or a model's name on the Hub.

    Raises:
        ConfigError: `out` exists, or the source is missing or inconsistent.
    """
    out = user_path(out)
    if out.exists():
        raise ConfigError(Problem("out", out, "exists already"))
    checkpoint = HuggingFaceCheckpoint.open(find_checkpoint(source, progress=progress))
    tensors = {PREFIX + mapped.name: _ours(checkpoint, mapped) for mapped in checkpoint.mapped.values()}
    with ByteProgress(f"import {source}", checkpoint.nbytes, progress) as bar, write_folder(out) as folder:
        written = write_file(folder / "model.safetensors", tensors, bar.advance)
        (folder / "huggingface").mkdir()
        for name in TOKENIZER_FILES + OTHER_FILES:
            if (file := inside(checkpoint.directory, name)).is_file():
                shutil.copyfile(file, folder / name if name in TOKENIZER_FILES else folder / "huggingface" / name)
        state = {"config": asdict(checkpoint.config), "step": 0, "val_loss": None}
        write_state(folder, state, {"model.safetensors": written})
    return checkpoint


def export_checkpoint(
    source: str | Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Family:
    """Writes the model of a run, or of one checkpoint, as a folder that Hugging Face's tools load.

    Args:
        source: a run's folder, a `step-*` in one, or the output of `import_checkpoint`.
        family: the family to write; None takes that of the import, or else the first that has such models.
        dtype: "float32", "bfloat16" or "float16"; None keeps the stored one.

    Raises:
        ConfigError: there is no checkpoint, no family has such models, or `out` exists.
    """
    out = user_path(out)
    if out.exists():
        raise ConfigError(Problem("out", out, "exists already"))
    path = find_weights(source)
    weights = open_weights(path)
    if not isinstance(weights, CheckpointWeights):
        raise ConfigError(Problem.in_file(source, "is a Hugging Face checkpoint already"))
    folders = _folders(weights)
    original = next((settings for folder in folders if (settings := _settings(folder))), None)
    chosen = _family(family, weights.config, original)
    settings = chosen.config_json(weights.config) | _token_ids(folders)
    if original is not None and original.get("model_type") == chosen.model_type:
        settings = original | ({} if same_model(chosen.config(original), weights.config) else settings)
    mapped = tensor_map(chosen, weights.config)
    cast = None if dtype is None else _dtype(dtype)
    settings["dtype"] = _dtype_name(cast or weights.dtype(mapped[0].name))
    for name in ("torch_dtype", "transformers_weights"):  # as dtype was called before; other files than are written
        settings.pop(name, None)
    tensors = {name: tensor for each in mapped for name, tensor in _theirs(weights, each, cast).items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    with ByteProgress(f"export {source}", total, progress) as bar, write_folder(out) as folder:
        _write_shards(folder, tensors, shard_bytes, bar.advance)
        for name in TOKENIZER_FILES:
            if file := next(_found(folders, name), None):
                shutil.copyfile(file, folder / name)
        _complete_tokenizer(folder)
        _write_generation_config(folder, folders)
        (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return chosen


def export_adapters(source: str | Path, out: Path) -> str:
    """Writes the adapters of a run or a checkpoint for PEFT, and returns the model to which they belong.

    Raises:
        ConfigError: the source has no adapters, or `out` exists.
    """
    out = user_path(out)
    if out.exists():
        raise ConfigError(Problem("out", out, "exists already"))
    weights = open_weights(find_weights(source))
    if not isinstance(weights, CheckpointWeights) or weights.adapters is None:
        raise ConfigError(Problem.in_file(source, "has no adapters; `fiddlehead export hf` writes the whole model"))
    original = next((settings for folder in _folders(weights) if (settings := _settings(folder))), None)
    family = _family(None, weights.config, original)
    parts = {
        each.name.removesuffix(".weight"): [
            (name.removesuffix(".weight"), shape[0] if len(each.theirs) > 1 else each.shape[0])
            for name, shape in each.theirs
        ]
        for each in tensor_map(family, weights.config)
        if each.name.startswith("layers.") and each.name.endswith(".weight") and len(each.shape) == 2
    }
    adapters = {name: tensor.load() for name, tensor in weights.tensors.items()}
    with write_folder(out) as folder:
        save_peft(folder, *to_peft(adapters, parts, weights.adapters.lora, weights.state["init_from"]))
    return weights.state["init_from"]


def find_checkpoint(source: str, *, progress: bool = True) -> Path:
    """The folder named by `source`, or the folder to which the Hub's model of that name is downloaded.

    Raises:
        ConfigError: there is no such folder or model.
    """
    if user_path(source).is_dir():
        return user_path(source)
    if user_path(source).is_file():
        message = f"is a file; name its folder, which has config.json too: {str(user_path(source).parent)!r}"
        raise ConfigError(Problem.in_file(repr(source), message))
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        message = "there is no such folder, and it is not a model's name on the Hub (OWNER/NAME)"
        raise ConfigError(Problem.in_file(repr(source), message))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    try:
        # No pickled weights, no code, and no weights in other formats, which are not read.
        files = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", *TOKENIZER_FILES, *OTHER_FILES]
        others = ["*/*", "consolidated*.safetensors"]
        return Path(snapshot_download(source, allow_patterns=files, ignore_patterns=others))
    except Exception as error:  # of the Hub, of the network, of the disk: many kinds
        message = f"there is no such folder, and the Hub does not give it: {error}"
        raise ConfigError(Problem.in_file(repr(source), message)) from error


def _ours(checkpoint: HuggingFaceCheckpoint, mapped: MappedTensor) -> LazyTensor:
    parts = [checkpoint.tensors[name] for name, _ in mapped.theirs]
    dtypes = {part.dtype for part in parts}

    def joined() -> Iterator[memoryview]:
        for part in parts:
            yield from part.chunks()

    def changed() -> Iterable[memoryview]:
        return [bytes_of(checkpoint.load(mapped.name))]

    if len(dtypes) > 1:
        names = ", ".join(name for name, _ in mapped.theirs)
        raise ConfigError(Problem.in_file(names, f"have different dtypes, {', '.join(sorted(dtypes))}"))
    return LazyTensor(parts[0].dtype, mapped.shape, joined if mapped.plain else changed)


def _theirs(weights: CheckpointWeights, mapped: MappedTensor, cast: str | None) -> dict[str, LazyTensor]:
    dtype = cast or weights.dtype(mapped.name)
    if mapped.plain and dtype == weights.dtype(mapped.name) and weights.adapters is None:
        stored = weights.tensors[mapped.name]
        tensors, start = {}, stored.start
        for name, shape in mapped.theirs:
            part = replace(stored, shape=shape, start=start, nbytes=LazyTensor(dtype, shape, lambda: ()).nbytes)
            tensors[name] = LazyTensor(dtype, shape, part.chunks)
            start += part.nbytes
        return tensors

    def changed(number: int) -> Callable[[], Iterable[memoryview]]:
        return lambda: [bytes_of(mapped.to_theirs(weights.load(mapped.name).to(DTYPES[dtype]))[number])]

    return {name: LazyTensor(dtype, shape, changed(number)) for number, (name, shape) in enumerate(mapped.theirs)}


def _write_shards(folder: Path, tensors: dict[str, LazyTensor], limit: int, advance: Callable[[int], Any]) -> None:
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(folder / "model.safetensors", tensors, advance)
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard, advance)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _folders(weights: CheckpointWeights) -> list[Path]:
    """The folders with the files beside the weights: of the checkpoint, its run, and the weights it began with."""
    folders: list[Path] = []
    seen: CheckpointWeights | None = weights
    while seen is not None:
        folders += [seen.path, seen.path.resolve().parents[1]]
        origin = seen.state.get("init_from")
        seen = None
        if origin and (user_path(origin) / "state.json").is_file():
            seen = CheckpointWeights.open(user_path(origin))
        elif origin:
            folders.append(user_path(origin))
    return folders


def _found(folders: list[Path], name: str) -> Iterator[Path]:
    """Yields the files of this name, those of the model itself first."""
    return (file for each in folders for file in (each / name, each / "huggingface" / name) if file.is_file())


def _settings(folder: Path) -> dict[str, Any] | None:
    """The `config.json` of imported Hugging Face weights."""
    for file in (folder / "huggingface" / "config.json", folder / "config.json"):
        if file.is_file():
            return read_object(file)
    return None


def _family(name: str | None, config: TransformerConfig, original: dict[str, Any] | None) -> Family:
    if name is not None:
        family = family_of({"model_type": name}, "--as")
        if not family.expresses(config):
            message = f"has no model of this shape; {family_for(config).model_type!r} has"
            raise ConfigError(Problem("model_type", name, message))
        return family
    if original is not None and (family := FAMILIES.get(str(original.get("model_type")))) and family.expresses(config):
        return family
    return family_for(config)


def _token_ids(folders: list[Path]) -> dict[str, Any]:
    """The tokenizer's special tokens; missing ones are set to null, because families have defaults for them."""
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if home := next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None):
        tokenizer = TokenizerFile(home)
        ids |= {f"{name}_id": tokenizer.id_of(name) for name in ("bos_token", "pad_token")}
        ids["eos_token_id"] = _one_or_all(tokenizer.stop_ids)
    return ids


def _complete_tokenizer(folder: Path) -> None:
    """Adds the file that transformers needs beside a lone `tokenizer.json`."""
    if not (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return
    tokenizer = TokenizerFile(folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    update_settings(folder / "tokenizer_config.json", **settings, eos_token=tokenizer.eos_token)


def _write_generation_config(folder: Path, origins: list[Path]) -> None:
    """Writes to `folder` the generation settings of the origins, and all tokens at which generation stops."""
    files = list(_found(origins, "generation_config.json"))
    for file in reversed(files):  # the model's own last, so that they win
        update_settings(folder / "generation_config.json", **read_settings(file))
    home = next((each for each in origins if (each / "tokenizer.json").is_file()), None)
    if home is None:
        return
    stop_ids = TokenizerFile(home).stop_ids
    written = SpecialTokens.read(folder).generation_eos_ids
    if set(written) != set(stop_ids) and (files or len(stop_ids) > 1):
        update_settings(folder / "generation_config.json", eos_token_id=_one_or_all(stop_ids))


def _one_or_all(ids: list[int]) -> int | list[int]:
    """Ids in the form of Hugging Face's files."""
    return ids[0] if len(ids) == 1 else ids


def _dtype(name: str) -> str:
    allowed = {_dtype_name(dtype): dtype for dtype in ("F32", "BF16", "F16")}
    if name not in allowed:
        raise ConfigError(Problem("dtype", name, "", allowed))
    return allowed[name]


def _dtype_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")
