"""Imports NeMo 2.0's checkpoints: parameter by parameter, without the whole model in memory or running code."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiddlehead.checkpoints.folder import write_folder, write_state
from fiddlehead.checkpoints.huggingface.convert import TOKENIZER_FILES
from fiddlehead.checkpoints.nemo.context import Context
from fiddlehead.checkpoints.nemo.distributed import METADATA, read_distributed
from fiddlehead.checkpoints.nemo.tensor_map import EMBEDDING, MappedTensor, MegatronTensors
from fiddlehead.checkpoints.safetensors_files import LazyTensor, bytes_of, write_file
from fiddlehead.checkpoints.weights import PREFIX
from fiddlehead.data.progress import ByteProgress
from fiddlehead.data.tokenizers import TokenizerFile
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import inside
from fiddlehead.files.paths import user_path
from fiddlehead.models import TransformerConfig


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    config: TransformerConfig
    nbytes: int
    rows: int
    """Rows of the embedding, of which `config.vocab_size` are kept."""
    tokenizer: Path | None
    """The folder from which the tokenizer was taken; None if there was none."""


def import_nemo(
    source: str | Path,
    out: Path,
    *,
    given: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    progress: bool = True,
) -> Imported:
    """Makes a fiddlehead checkpoint, the folder `out`, from a checkpoint of NeMo 2.0.

    Args:
        source: a folder with `weights/` and `context/`, or `weights/` itself.
        given: fields of `TransformerConfig` that the context does not say, or instead of what it says.
        tokenizer: a folder with a `tokenizer.json`; None is that in `context/`.

    Raises:
        ConfigError: `out` exists, or the source is missing, damaged, of another kind, or needs something that is not
            supported.
    """
    out = user_path(out)
    if out.exists():
        raise ConfigError(Problem("out", out, "exists already"))
    checkpoint, weights = _folders(user_path(source))
    tensors = MegatronTensors(weights, read_distributed(weights))
    home = _tokenizer_folder(checkpoint) if tokenizer is None else tokenizer
    tokens = None if home is None else TokenizerFile(home).vocab_size
    config, adds_one = Context.read(checkpoint).config(tensors, given or {}, tokens)
    mapped = tensors.mapped(config, adds_one=adds_one)
    lazy = {PREFIX + each.name: _lazy(each) for each in mapped}
    total = sum(tensor.nbytes for tensor in lazy.values())
    with ByteProgress(f"import {source}", total, progress) as bar, write_folder(out) as folder:
        written = write_file(folder / "model.safetensors", lazy, bar.advance)
        for name in TOKENIZER_FILES:
            if home is not None and (file := inside(home, name)).is_file():
                shutil.copyfile(file, folder / name)
        state = {"config": asdict(config), "step": 0, "val_loss": None}
        write_state(folder, state, {"model.safetensors": written})
    return Imported(config, total, tensors.tensors[EMBEDDING].shape[0], home)


def _lazy(mapped: MappedTensor) -> LazyTensor:
    def chunks() -> Iterable[memoryview]:
        return [bytes_of(mapped.load())]

    made: Callable[[], Iterable[memoryview]] = chunks
    return LazyTensor(mapped.dtype, mapped.shape, made)


def _folders(path: Path) -> tuple[Path, Path]:
    """The folder of a checkpoint, and that with its weights; raises `ConfigError` for other kinds of checkpoints."""
    if path.is_file():
        old = path.suffix == ".nemo"
        message = "is an archive of NeMo 1.0; convert it to NeMo 2.0 with NeMo's own script" if old else "is a file"
        raise ConfigError(
            Problem.in_file(path, f"{message}. A checkpoint of NeMo 2.0 is a folder with weights/ and context/")
        )
    if not path.is_dir():
        raise ConfigError(Problem.in_file(path, "there is no such folder"))
    candidates = [(path, path / "weights"), (path.parent, path)]
    for checkpoint, weights in candidates:
        if (weights / METADATA).is_file():
            return checkpoint, weights
    for _, weights in candidates:
        if weights.is_dir() and any((each / ".zarray").is_file() for each in weights.iterdir() if each.is_dir()):
            message = "has zarr arrays, which are not read; load it with NeMo and save it as torch_dist"
            raise ConfigError(Problem.in_file(weights, message))
    message = f"is not a checkpoint of NeMo 2.0: it has no weights/{METADATA}"
    if any(path.glob("mp_rank_*")) or any(path.glob("*.ckpt")):
        message += "; checkpoints of single ranks (mp_rank_*, *.ckpt) are not read"
    raise ConfigError(Problem.in_file(path, message))


def _tokenizer_folder(checkpoint: Path) -> Path | None:
    """The folder with the tokenizer that NeMo saved."""
    context = checkpoint / "context"
    if not context.is_dir():
        return None
    folders = [context, *sorted(folder for folder in context.iterdir() if folder.is_dir() and not folder.is_symlink())]
    return next((folder for folder in folders if inside(folder, "tokenizer.json").is_file()), None)
