"""A Hugging Face checkpoint, opened: checked as a whole, and read a tensor at a time. Nothing in it is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fiddlehead.errors import ConfigError, nearest
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.families import Family, family_of
from fiddlehead.models.safetensors_files import DTYPES, Stored, read_header
from fiddlehead.models.tensor_map import Mapped, tensor_map


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A folder as `save_pretrained` of transformers writes it, checked against what its `config.json` says."""

    directory: Path
    family: Family
    config: TransformerConfig
    tensors: dict[str, Stored]
    """By the names that the family's modules have."""
    mapped: dict[str, Mapped]
    """By the names of our parameters."""

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
        return cls(directory, family, config, tensors, {each.name: each for each in mapped})

    def load(self, name: str, part: Sequence[slice] = ()) -> torch.Tensor:
        """The parameter of ours that has this name, or the part of it that has a slice of each dimension."""
        mapped = self.mapped[name]
        return mapped.to_ours([self.tensors[name].load() for name, _ in mapped.theirs])[tuple(part)]

    def dtype(self, name: str) -> str:
        """Its dtype, as `Stored` has it."""
        return self.tensors[self.mapped[name].theirs[0][0]].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.tensors[name].nbytes for mapped in self.mapped.values() for name, _ in mapped.theirs)


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
