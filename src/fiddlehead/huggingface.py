"""Hugging Face checkpoints, in and out: shard by shard, never a whole model in memory, and nothing run from a file.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fiddlehead.data.progress import ByteProgress
from fiddlehead.data.tokenizers import TokenizerFile
from fiddlehead.errors import ConfigError, nearest
from fiddlehead.models import TransformerConfig
from fiddlehead.models.families import FAMILIES, Family, family_for, family_of, same_model
from fiddlehead.models.safetensors_files import DTYPES, Stored, ToWrite, bytes_of, read_header, write_file
from fiddlehead.models.tensor_map import Mapped, tensor_map
from fiddlehead.runs import RunDirectory
from fiddlehead.training.checkpoint_folder import newest_good, read_state, write_folder, write_state

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
OTHER_FILES = ("config.json", "generation_config.json")
SHARD_BYTES = 5 * 10**9
_PREFIX = "transformer."  # of the parameters in a checkpoint


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A folder as `save_pretrained` of transformers writes it, checked against what its `config.json` says."""

    directory: Path
    family: Family
    config: TransformerConfig
    tensors: dict[str, Stored]
    """By the names that the family's modules have."""
    mapped: list[Mapped]

    @classmethod
    def open(cls, directory: Path) -> HuggingFaceCheckpoint:
        """Reads the settings and the headers of the tensor files.

        Raises:
            ConfigError: something is not there or not what it says; it lists everything.
        """
        try:
            settings = json.loads((directory / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{directory}/config.json cannot be read: {error}") from error
        family = family_of(settings, f"{directory}/config.json")
        try:
            config = family.config(settings)
        except ConfigError as error:
            raise ConfigError(*(f"{directory}/config.json: {problem}" for problem in error.problems)) from error
        mapped = tensor_map(family, config)
        tensors = _with_prefix(_headers(directory), family)
        problems = _problems(tensors, mapped, family, config)
        if problems:
            raise ConfigError(f"{directory}: the tensors are not those of config.json:", *problems)
        return cls(directory, family, config, tensors, mapped)

    def load(self, mapped: Mapped) -> torch.Tensor:
        """One of our parameters."""
        return mapped.to_ours([self.tensors[name].load() for name, _ in mapped.theirs])

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.tensors[name].nbytes for mapped in self.mapped for name, _ in mapped.theirs)


def import_checkpoint(source: str, out: Path, *, progress: bool = True) -> HuggingFaceCheckpoint:
    """Makes a checkpoint of ours, the folder `out`, from a folder of Hugging Face's or a model's name on the Hub.

    Raises:
        ConfigError: `out` exists, or the source is not there or not what it says.
    """
    if out.exists():
        raise ConfigError(f"out={str(out)!r}: is there already")
    checkpoint = HuggingFaceCheckpoint.open(find_checkpoint(source, progress=progress))
    tensors = {_PREFIX + mapped.name: _ours(checkpoint, mapped) for mapped in checkpoint.mapped}
    with ByteProgress(f"import {source}", checkpoint.nbytes, progress) as bar, write_folder(out) as folder:
        checksum = write_file(folder / "model.safetensors", tensors, bar.advance)
        (folder / "huggingface").mkdir()
        for name in TOKENIZER_FILES + OTHER_FILES:
            if (file := checkpoint.directory / name).is_file():
                shutil.copyfile(file, folder / name if name in TOKENIZER_FILES else folder / "huggingface" / name)
        state = {"config": asdict(checkpoint.config), "step": 0, "val_loss": None}
        write_state(folder, state, {"model.safetensors": checksum})
    return checkpoint


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Family:
    """Writes the model of a run, or of one checkpoint, as a folder that Hugging Face's tools load.

    Args:
        source: a run's folder, a `step-*` of one, or what `import_checkpoint` made.
        family: as which family; None is the one it was imported as, or else the first that has such models.
        dtype: "float32", "bfloat16" or "float16"; None is as it is stored.

    Raises:
        ConfigError: there is no checkpoint, no family has such models, or `out` exists.
    """
    if out.exists():
        raise ConfigError(f"out={str(out)!r}: is there already")
    path, home = locate(source)
    config = TransformerConfig.from_dict(read_state(path)["config"])
    original = _original_settings(home)
    chosen = _family(family, config, original)
    settings = chosen.config_json(config) | _token_ids(home)
    if original is not None and original.get("model_type") == chosen.model_type:
        settings = original | ({} if same_model(chosen.config(original), config) else settings)
    stored = {name.removeprefix(_PREFIX): tensor for name, tensor in read_header(path / "model.safetensors").items()}
    cast = None if dtype is None else _dtype(dtype)
    first = cast or next(iter(stored.values())).dtype
    if settings.get("dtype", settings.get("torch_dtype")) != _dtype_name(first):
        settings = {name: value for name, value in settings.items() if name != "torch_dtype"}
        settings["dtype"] = _dtype_name(first)
    tensors = {
        name: tensor
        for mapped in tensor_map(chosen, config)
        for name, tensor in _theirs(stored[mapped.name], mapped, cast).items()
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    with ByteProgress(f"export {source}", total, progress) as bar, write_folder(out) as folder:
        _write_shards(folder, tensors, shard_bytes, bar.advance)
        for name in TOKENIZER_FILES + OTHER_FILES[1:]:
            for file in (home / name, home / "huggingface" / name):
                if file.is_file():
                    shutil.copyfile(file, folder / name)
        _complete_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return chosen


def locate(source: Path) -> tuple[Path, Path]:
    """The checkpoint that a path stands for, and the folder that has its tokenizer.

    Raises:
        ConfigError: there is no whole checkpoint.
    """
    if (source / "state.json").is_file():
        is_step = source.resolve().parent.name == "checkpoints"
        return source, source.resolve().parents[1] if is_step else source
    path = newest_good(RunDirectory(source).checkpoints)
    if path is None:
        raise ConfigError(f"{source}: is no checkpoint, and no run that has one")
    return path, source


def find_checkpoint(source: str, *, progress: bool = True) -> Path:
    """The folder that `source` names, or the one to which the Hub's model of that name is downloaded.

    Raises:
        ConfigError: there is none.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ConfigError(f"{source!r}: there is no such folder, and it is not a model's name on the Hub (OWNER/NAME)")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    try:
        # No pickled weights, no code.
        files = ["*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES, *OTHER_FILES]
        return Path(snapshot_download(source, allow_patterns=files))
    except Exception as error:  # of the Hub, of the network, of the disk: many kinds
        raise ConfigError(f"{source!r} is no folder here, and the Hub does not give it: {error}") from error


def _headers(directory: Path) -> dict[str, Stored]:
    """The tensors of a folder, in one file or many."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{index}: cannot be read: {error!r}") from error
        files = sorted(set(listed.values()))
        if missing := [name for name in files if not (directory / name).is_file()]:
            raise ConfigError(*(f"{directory}/{name}: is missing, and {index.name} names it" for name in missing))
    else:
        files = [file.name for file in sorted(directory.glob("*.safetensors"))]
    if not files:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
        if pickled:
            raise ConfigError(
                f"{directory}: has only pickled weights ({', '.join(pickled[:3])}), and unpickling runs what they "
                'say. If you trust them, convert them: python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{directory}').save_pretrained('CONVERTED')\""
            )
        raise ConfigError(f"{directory}: has no *.safetensors")
    tensors: dict[str, Stored] = {}
    for name in files:
        tensors |= read_header(directory / name)
    return tensors


def _with_prefix(tensors: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """The tensors by the names they have in the whole model; a checkpoint of its body alone lacks the prefix."""
    prefix = str(family.modules["embedding"]).partition(".")[0] + "."
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    return {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in tensors.items()}


def _problems(tensors: dict[str, Stored], mapped: list[Mapped], family: Family, config: TransformerConfig) -> list[str]:
    expected = dict(pair for each in mapped for pair in each.theirs)
    embedding = f"{family.modules['embedding']}.weight"
    extra = [name for name in tensors if name not in expected and not name.endswith(family.ignored or ("\0",))]
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            like = nearest(name, extra)
            problems.append(f"{name} {list(shape)}: is missing" + (f"; the nearest there: {like}" if like else ""))
        elif tensors[name].shape != shape:
            problems.append(f"{name}: is {list(tensors[name].shape)}, and config.json makes it {list(shape)}")
        elif not DTYPES[tensors[name].dtype].is_floating_point or tensors[name].dtype.startswith("F8"):
            problems.append(f"{name}: is {tensors[name].dtype}, quantized: only F64, F32, F16 and BF16 are read")
    for name in extra:
        if name == "lm_head.weight" and config.share_embeddings_and_output_weights and embedding in tensors:
            if not _same_bytes(tensors[name], tensors[embedding]):
                problems.append(f"{name}: differs from {embedding}, and tie_word_embeddings makes them one")
            continue
        problems.append(f"{name} {list(tensors[name].shape)}: is not part of such a model")
    shown = 20
    if len(problems) > shown:
        problems[shown:] = [f"and {len(problems) - shown} more"]
    return problems


def _same_bytes(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(one.pieces(), other.pieces(), strict=True))


def _ours(checkpoint: HuggingFaceCheckpoint, mapped: Mapped) -> ToWrite:
    parts = [checkpoint.tensors[name] for name, _ in mapped.theirs]
    dtypes = {part.dtype for part in parts}

    def joined() -> Iterator[memoryview]:
        for part in parts:
            yield from part.pieces()

    def changed() -> Iterable[memoryview]:
        return [bytes_of(checkpoint.load(mapped))]

    if len(dtypes) > 1:
        names = ", ".join(name for name, _ in mapped.theirs)
        raise ConfigError(f"{names}: are of different dtypes, {', '.join(sorted(dtypes))}")
    return ToWrite(parts[0].dtype, mapped.shape, joined if mapped.plain else changed)


def _theirs(stored: Stored, mapped: Mapped, cast: str | None) -> dict[str, ToWrite]:
    dtype = cast or stored.dtype
    if mapped.plain and dtype == stored.dtype:
        tensors, start = {}, stored.start
        for name, shape in mapped.theirs:
            part = replace(stored, shape=shape, start=start)
            part = replace(part, nbytes=ToWrite(dtype, shape, lambda: ()).nbytes)
            tensors[name] = ToWrite(dtype, shape, part.pieces)
            start += part.nbytes
        return tensors

    def changed(number: int) -> Callable[[], Iterable[memoryview]]:
        return lambda: [bytes_of(mapped.to_theirs(stored.load().to(DTYPES[dtype]))[number])]

    return {name: ToWrite(dtype, shape, changed(number)) for number, (name, shape) in enumerate(mapped.theirs)}


def _write_shards(folder: Path, tensors: dict[str, ToWrite], limit: int, advance: Callable[[int], Any]) -> None:
    shards: list[dict[str, ToWrite]] = [{}]
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


def _original_settings(home: Path) -> dict[str, Any] | None:
    file = home / "huggingface" / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _family(name: str | None, config: TransformerConfig, original: dict[str, Any] | None) -> Family:
    if name is not None:
        family = family_of({"model_type": name}, "--as")
        if not family.expresses(config):
            raise ConfigError(f"model_type={name!r}: has no model of this shape; {family_for(config).model_type!r} has")
        return family
    if original is not None and (family := FAMILIES.get(str(original.get("model_type")))) and family.expresses(config):
        return family
    return family_for(config)


def _token_ids(home: Path) -> dict[str, Any]:
    """The special tokens that the tokenizer has; those it has not are said to be none, as families assume some."""
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if (home / "tokenizer.json").is_file():
        ids["eos_token_id"] = TokenizerFile(home / "tokenizer.json").eos_id
    return ids


def _complete_tokenizer(folder: Path) -> None:
    """Adds what transformers needs beside a `tokenizer.json` that stands alone."""
    if not (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return
    tokenizer = TokenizerFile(folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["eos_token"] = tokenizer.eos_token
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _dtype(name: str) -> str:
    allowed = {_dtype_name(dtype): dtype for dtype in ("F32", "BF16", "F16")}
    if name not in allowed:
        raise ConfigError(f"dtype={name!r}: allowed: {', '.join(allowed)}")
    return allowed[name]


def _dtype_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")
