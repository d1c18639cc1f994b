"""The source of a model's weights: a run's checkpoint, an imported checkpoint, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fiddlehead.checkpoints import fingerprint
from fiddlehead.checkpoints.folder import newest_good, read_tensors, verify
from fiddlehead.checkpoints.huggingface.files import HuggingFaceCheckpoint, refuse_adapters
from fiddlehead.checkpoints.safetensors_files import StoredTensor
from fiddlehead.errors import ConfigError, Problem, first_of, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.models import Transformer, TransformerConfig, nf4
from fiddlehead.models.lora import LoRA, merge_state
from fiddlehead.models.meta import shapes_only
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run

PREFIX = "transformer."
"""The prefix of a model's parameters in a checkpoint."""
CHANGED = (
    "no longer has the weights with which the training began; put those back, or start a new run with what is there now"
)
"""What is wrong with weights that were overwritten while a run still needs them."""


class Weights(Protocol):
    """A model whose parameters are read on demand."""

    @property
    def config(self) -> TransformerConfig:
        """The model's shape."""
        ...

    def load(self, name: str, slices: Sequence[slice] = ()) -> torch.Tensor:
        """Returns the parameter of `Transformer` that has this name; with slices, one a dimension, only that part."""
        ...

    def dtype(self, name: str) -> str:
        """Its dtype, a key of `safetensors_files.DTYPES`."""
        ...

    def fingerprint(self) -> str:
        """A short text that differs for other weights, and does not depend on where these are."""
        ...


class Adapters(NamedTuple):
    """What a checkpoint that has only adapters was trained on, and the settings of the adapters."""

    base: Weights
    lora: LoRA


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of a fiddlehead checkpoint; adapters are merged into their base."""

    path: Path
    state: dict[str, Any]
    config: TransformerConfig
    tensors: dict[str, StoredTensor]
    adapters: Adapters | None
    """None if the checkpoint is whole."""

    @classmethod
    def open(cls, path: Path) -> CheckpointWeights:
        """Checks every file of the checkpoint.

        Raises:
            DamagedCheckpointError: a file has changed since it was written.
            ConfigError: the adapters' base is missing or another one, or the tensors are not those of its config.
        """
        state = verify(path)
        tensors = {name.removeprefix(PREFIX): t for name, t in read_tensors(path, state, "model").items()}
        adapters = None
        if state.get("lora"):
            try:
                base = open_weights(state["init_from"])
            except ConfigError as error:
                problems = (Problem.in_file(path, f"has only adapters: {problem}") for problem in error.problems)
                raise ConfigError(*problems) from error
            if state.get("base") not in (None, base.fingerprint()):  # checkpoints of earlier versions have none
                message = f"has only adapters, and {state['init_from']} {CHANGED}"
                raise ConfigError(Problem.in_file(path, message))
            adapters = Adapters(base, LoRA(**state["lora"]))
        if "config" not in state:
            raise ConfigError(Problem.in_file(path, "has no config: a LanguageModel writes it in on_save_checkpoint"))
        config = TransformerConfig.from_dict(state["config"])
        if adapters is None:
            _refuse_other_tensors(path, config, tensors)
        return cls(path, state, config, tensors, adapters)

    def load(self, name: str, slices: Sequence[slice] = ()) -> torch.Tensor:
        """As `Weights.load`; of a checkpoint without adapters, only the slices are read."""
        if self.adapters is None:
            return self.tensors[name].load(slices)
        return self._merged(name, *self.adapters)[tuple(slices)]

    def dtype(self, name: str) -> str:
        """As `Weights.dtype`."""
        return self.tensors[name].dtype if self.adapters is None else self.adapters.base.dtype(name)

    def fingerprint(self) -> str:
        """As `Weights.fingerprint`, of the checksums with which the files were compared when this was opened."""
        files = {tensor.file.name: self.state["files"][tensor.file.name] for tensor in self.tensors.values()}
        if self.adapters is None:
            return fingerprint.of_parts(files)
        return fingerprint.of_parts(files, asdict(self.adapters.lora), self.adapters.base.fingerprint())

    def _merged(self, name: str, base: Weights, lora: LoRA) -> torch.Tensor:
        module = name.removesuffix(".weight")
        parts = {part: f"{module}.{part}" for part in ("lora_a", "lora_b", "magnitude")}
        own = {part: self.tensors[part].load() for part in parts.values() if part in self.tensors}
        if not own or module == name:
            return base.load(name)
        return merge_state({name: base.load(name)} | own, lora)[name]


def _refuse_other_tensors(path: Path, config: TransformerConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ConfigError if a checkpoint lacks a parameter of the `Transformer` that its config describes."""
    if config.num_layers > len(tensors):  # before anything is made for each layer
        message = f"its config has num_layers={config.num_layers}, and it has {len(tensors)} tensors"
        raise ConfigError(Problem.in_file(path, message))
    with shapes_only():
        expected = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(Problem.in_file(PREFIX + name, "is missing"))
        elif tensors[name].shape != shape:
            message = f"is {list(tensors[name].shape)}, and the config makes it {list(shape)}"
            problems.append(Problem.in_file(PREFIX + name, message))
    if problems:
        raise ConfigError(
            Problem.in_file(
                path,
                "its tensors are not those of its config, so another kind of model wrote it, which has to read it:",
            ),
            *first_of(problems),
        )


def open_weights(source: str | Path, runs: str | Path = "runs") -> Weights:
    """The weights named by a path, or by a run's name in the folder `runs`.

    Raises:
        ConfigError: there are none.
        DamagedCheckpointError: they have changed since they were written.
    """
    path = find_weights(source, runs)
    if (path / "state.json").is_file():
        return CheckpointWeights.open(path)
    return HuggingFaceCheckpoint.open(path)


def find_weights(source: str | Path, runs: str | Path = "runs") -> Path:
    """The folder with the weights: a checkpoint's, a run's newest checkpoint, or one of Hugging Face's.

    Raises:
        ConfigError: there is none.
    """
    path = user_path(source)
    if (path / "state.json").is_file() or (path / "config.json").is_file():
        return path
    refuse_adapters(path)
    refuse_nemo(path)
    try:
        run = RunDirectory(path) if (path / "checkpoints").is_dir() else find_run(str(source), runs)
    except ConfigError as error:
        what = "has no weights" if path.is_dir() else "is not a folder"
        problems = (Problem("", message=f"{problem}; and {str(source)!r} {what}") for problem in error.problems)
        raise ConfigError(*problems) from None
    checkpoint = newest_good(run.checkpoints)
    if checkpoint is None:
        raise ConfigError(Problem.in_file(repr(str(source)), "the run has no good checkpoint"))
    return checkpoint


def refuse_nemo(path: Path) -> None:
    """Raises ConfigError for a checkpoint of NeMo 2.0, which is imported first: a folder, or the weights in it."""
    for checkpoint, weights in ((path, path / "weights"), (path.parent, path)):
        if weights.name == "weights" and weights.is_dir() and (checkpoint / "context").is_dir():
            message = "is a checkpoint of NeMo; its weights are imported first:"
            raise ConfigError(f"{path} {message} `fiddlehead import nemo {checkpoint} --out OUT`, and OUT is the path")


def find_tokenizer(weights: Path) -> Path | None:
    """The folder with the tokenizer of the weights in a folder; None if there is none."""
    of_run = weights.resolve().parents[1]
    return next((folder for folder in (weights, of_run) if (folder / "tokenizer.json").is_file()), None)


def load_transformer(
    weights: Weights, config: TransformerConfig | None = None, *, quantize: bool = False
) -> Transformer:
    """A model with these weights, in the default dtype. It needs memory for the model and one tensor.

    Args:
        config: instead of that of the weights, with parameters of the same shapes.
        quantize: store the layers' linear weights in NF4; the default device quantizes them, one after the other.
    """
    with shapes_only():
        transformer = Transformer(config or weights.config)
        names = list(transformer.state_dict())
        if quantize:
            nf4.quantize_layers(transformer)
    quantized, dtype, device = nf4.quantized(transformer), torch.get_default_dtype(), torch.get_default_device()
    # Each tensor becomes the parameter at once, because a second copy of all might not fit.
    for name in names:
        module, _, parameter = name.rpartition(".")
        tensor = weights.load(name)
        tensor = nf4.quantize(tensor.to(device)) if name in quantized else tensor.to(dtype)
        transformer.get_submodule(module).register_parameter(parameter, torch.nn.Parameter(tensor))
    return transformer


def refuse_another_shape(config: TransformerConfig, weights: Weights, source: str | Path) -> None:
    """Raises ConfigError if the weights have other parameters than a model of `config`."""
    free = ("attention_backend", "seq_length", "attention_dropout", "hidden_dropout", "init_method_std")
    theirs = asdict(weights.config)
    refuse(
        Problem(f"config.{name}", value, f"init_from={str(source)!r} has {theirs[name]!r}; config=None takes that")
        for name, value in asdict(config).items()
        if name not in (*free, "moe_aux_loss_coeff") and value is not None and theirs[name] != value
    )
