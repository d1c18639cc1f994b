"""Opens a Hugging Face checkpoint: checks all of it, then reads one tensor at a time. No code in it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fiddlehead.checkpoints import fingerprint
from fiddlehead.checkpoints.huggingface.families import Family, family_of
from fiddlehead.checkpoints.huggingface.tensor_map import MappedTensor, tensor_map
from fiddlehead.checkpoints.safetensors_files import DTYPES, StoredTensor, read_header
from fiddlehead.errors import ConfigError, Problem, first_of, nearest, refuse
from fiddlehead.files.foreign import inside, read_object
from fiddlehead.models.config import TransformerConfig
from fiddlehead.numbers import is_whole


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A folder as `save_pretrained` of transformers writes it, checked against what its `config.json` says."""

    directory: Path
    family: Family
    config: TransformerConfig
    tensors: dict[str, StoredTensor]
    """Tensors by the names of the family's modules."""
    mapped: dict[str, MappedTensor]
    """Tensors by the names of our parameters."""
    unread: tuple[str, ...] = ()
    """Other safetensors files in the folder; transformers does not read them either."""

    @classmethod
    def open(cls, directory: Path) -> HuggingFaceCheckpoint:
        """Reads the settings and the headers of the tensor files.

        Raises:
            ConfigError: something is missing or inconsistent; with all problems.
        """
        refuse_adapters(directory)
        settings = read_object(inside(directory, "config.json"))
        family = family_of(settings, f"{directory}/config.json")
        files = weight_files(directory, settings.get("transformers_weights"))
        tensors = _with_prefix(_headers(files), family)
        try:
            _refuse_larger(settings, family, list(tensors.values()))
            config = family.config(settings)
        except ConfigError as error:
            file = directory / "config.json"
            raise ConfigError(*(Problem.in_file(file, problem) for problem in error.problems)) from error
        mapped = tensor_map(family, config)
        problems = _problems(tensors, mapped, family, config)
        if problems:
            raise ConfigError(Problem.in_file(directory, "the tensors are not those of config.json:"), *problems)
        unread = sorted({file.name for file in directory.glob("*.safetensors")} - {file.name for file in files})
        return cls(directory, family, config, tensors, {each.name: each for each in mapped}, tuple(unread))

    def load(self, name: str, slices: Sequence[slice] = ()) -> torch.Tensor:
        """Returns the parameter of `Transformer` that has this name; with slices, one a dimension, only that part."""
        mapped = self.mapped[name]
        return mapped.to_ours([self.tensors[name].load() for name, _ in mapped.theirs])[tuple(slices)]

    def dtype(self, name: str) -> str:
        """Its dtype, as `StoredTensor` has it."""
        return self.tensors[self.mapped[name].theirs[0][0]].dtype

    def fingerprint(self) -> str:
        """As `Weights.fingerprint`, of samples of the files' bytes."""
        names = (name for mapped in self.mapped.values() for name, _ in mapped.theirs)
        return fingerprint.of_tensors((name, self.tensors[name]) for name in names)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.tensors[name].nbytes for mapped in self.mapped.values() for name, _ in mapped.theirs)


def refuse_adapters(directory: Path) -> None:
    """Raises ConfigError if the folder has PEFT adapters, which transformers adds to the model that they name."""
    file = inside(directory, "adapter_config.json")
    if file.is_file():
        base = read_object(file).get("base_model_name_or_path")
        message = (
            f"the folder has adapters for {base!r}, not a whole model. Merge them with PEFT "
            "(merge_and_unload, then save_pretrained) and use that folder; if the folder has the whole "
            "model too, move its adapter_* files away"
        )
        raise ConfigError(Problem.in_file(file, message))


def weight_files(directory: Path, named: Any = None) -> list[Path]:
    """The files that transformers loads from a folder: one of a fixed name, or those that an index lists.

    Args:
        named: the file or the index that `config.json` asks for as `transformers_weights`.

    Raises:
        ConfigError: there are no weights, or a file or tensor that the index lists is missing.
    """
    names = ("model.safetensors", "model.safetensors.index.json") if named is None else (named,)
    if not all(str(name).endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise ConfigError(
            Problem("transformers_weights", named, f"must name a safetensors file, or its index, in {directory}")
        )
    files = (inside(directory, name, f"{directory}/config.json: transformers_weights") for name in names)
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ConfigError(_no_weights(directory, names))
    return [found] if found.suffix == ".safetensors" else _listed(found)


def _listed(index: Path) -> list[Path]:
    """The files that an index lists."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ConfigError(Problem.in_file(index, "weight_map must say for each tensor which file has it"))
    files = [inside(index.parent, name, index) for name in sorted(set(listed.values()))]
    if missing := [file for file in files if not file.is_file()]:
        refuse(first_of([Problem.in_file(file, f"is missing, and {index.name} names it") for file in missing]))
    there = {name for file in files for name in read_header(file)}
    absent = [name for name in listed if name not in there]
    refuse(first_of([Problem.in_file(index, f"{name} is in none of the files that it lists") for name in absent]))
    return files


def _no_weights(directory: Path, names: Sequence[str]) -> Problem:
    there = sorted(file.name for file in directory.glob("*.safetensors"))
    if there:
        said = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        return Problem.in_file(directory, f"has no {' and no '.join(names)}, and transformers does not load {said}")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickled:
        return Problem.in_file(
            directory,
            f"has only pickled weights ({', '.join(pickled[:3])}), and unpickling runs code from them. If you trust "
            'them, convert them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('CONVERTED')\"",
        )
    return Problem.in_file(directory, "has no *.safetensors")


def _headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of some files; each must be in only one of them."""
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                problems.append(Problem.in_file(name, f"is in {tensors[name].file} and in {file}"))
            tensors[name] = tensor
    refuse(first_of(problems))
    return tensors


def _with_prefix(tensors: dict[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """The tensors by their names in the whole model; a checkpoint of the body alone lacks the prefix."""
    prefix = str(family.modules["embedding"]).partition(".")[0] + "."
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    return {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in tensors.items()}


_SIZES = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"),
    *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
)
_SMALL, _FEW = 1 << 16, 256
"""Sizes and numbers of layers that are cheap to try; if they are wrong, `_problems` says which tensors differ."""


def _refuse_larger(settings: dict[str, Any], family: Family, tensors: Sequence[StoredTensor]) -> None:
    """Raises ConfigError for sizes that these tensors cannot have, before anything of such a size is made."""
    sizes = (*_SIZES, "seq_length") if "position_embedding" in family.modules else _SIZES
    longest = max((side for tensor in tensors if tensor.nbytes for side in tensor.shape), default=0)
    usual = {ours: theirs for theirs, ours in family.settings.items()}
    given: dict[str, tuple[str, int]] = {}
    for name, value in settings.items():
        ours = family.settings.get(family.aliases.get(name, name))
        if ours and is_whole(value):
            given[ours] = name, value
    problems = [
        Problem(name, value, f"no tensor in the files is as large; the longest side is {longest}")
        for name, value in (given[ours] for ours in sizes if ours in given)
        if value > max(longest, _SMALL)
    ]
    defaults = family.defaults
    layers, experts = (
        given.get(ours, (usual.get(ours, ""), defaults.get(usual.get(ours, ""), 1)))
        for ours in ("num_layers", "num_moe_experts")
    )
    by_expert = any("#" in name for names in family.modules.values() for name in names)
    needed = layers[1] * (max(1, experts[1]) if by_expert else 1)
    if needed > max(len(tensors), _FEW):
        said = f"{layers[0]}={layers[1]}" + (f", {experts[0]}={experts[1]}" if by_expert else "")
        problems.append(Problem("", message=f"{said}: the files have only {len(tensors)} tensors"))
    refuse(problems)


def _problems(
    tensors: dict[str, StoredTensor], mapped: list[MappedTensor], family: Family, config: TransformerConfig
) -> list[str]:
    expected = dict(pair for each in mapped for pair in each.theirs)
    embedding = f"{family.modules['embedding']}.weight"
    extra = [name for name in tensors if name not in expected and not name.endswith(family.ignored or ("\0",))]
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            like = nearest(name, extra)
            hint = f"; the nearest there: {like}" if like else ""
            problems.append(Problem.in_file(f"{name} {list(shape)}", f"is missing{hint}"))
        elif tensors[name].shape != shape:
            message = f"is {list(tensors[name].shape)}, and config.json makes it {list(shape)}"
            problems.append(Problem.in_file(name, message))
        elif not DTYPES[tensors[name].dtype].is_floating_point or tensors[name].dtype.startswith("F8"):
            message = f"is {tensors[name].dtype}, quantized: only F64, F32, F16 and BF16 are read"
            problems.append(Problem.in_file(name, message))
    for name in extra:
        if name == "lm_head.weight" and config.share_embeddings_and_output_weights and embedding in tensors:
            if not _same_bytes(tensors[name], tensors[embedding]):
                message = f"differs from {embedding}, and tie_word_embeddings makes them one"
                problems.append(Problem.in_file(name, message))
            continue
        problems.append(Problem.in_file(f"{name} {list(tensors[name].shape)}", "is not part of such a model"))
    return first_of(problems)


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))
