"""Converts multi-head to grouped-query attention: fewer key/value heads, for a little more training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch

from fiddlehead.checkpoints.folder import write_folder, write_state
from fiddlehead.checkpoints.huggingface.convert import OTHER_FILES, TOKENIZER_FILES
from fiddlehead.checkpoints.safetensors_files import LazyTensor, bytes_of, write_file
from fiddlehead.checkpoints.weights import PREFIX, find_tokenizer, find_weights, open_weights
from fiddlehead.data.progress import ByteProgress
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.heads import Method, pool_heads
from fiddlehead.models.meta import shapes_only


def convert_gqa(
    source: str | Path,
    out: Path,
    num_query_groups: int,
    method: Method = "mean",
    *,
    seed: int = 0,
    progress: bool = True,
) -> TransformerConfig:
    """Writes a checkpoint like `source` with `num_query_groups` key/value heads, each made of those it replaces.

    Args:
        source: a run, a checkpoint, or a Hugging Face checkpoint's folder.
        method: "mean" of the heads that fall together (Ainslie et al. 2023), the "first" of them, or "random", which
            is what the others have to be better than.
        seed: of "random".

    Raises:
        ConfigError: the heads cannot be grouped so, or `out` exists.
    """
    out = user_path(out)
    if out.exists():
        raise ConfigError(Problem("out", out, "exists already"))
    if method not in get_args(Method):
        raise ConfigError(Problem.unknown("method", method, "method", get_args(Method)))
    path = find_weights(source)
    weights = open_weights(path)
    before = weights.config
    if num_query_groups < 1 or before.groups % num_query_groups or num_query_groups == before.groups:
        allowed = [groups for groups in range(1, before.groups) if before.groups % groups == 0]
        message = f"the model has {before.groups} key/value heads"
        raise ConfigError(Problem("num_query_groups", num_query_groups, message, allowed))
    after = replace(before, num_query_groups=num_query_groups)
    with shapes_only():
        shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(after).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)

    def chunks(name: str) -> Callable[[], Iterable[memoryview]]:
        return lambda: [bytes_of(pool_heads(name, weights.load(name), before, num_query_groups, method, generator))]

    tensors = {PREFIX + name: LazyTensor(weights.dtype(name), shape, chunks(name)) for name, shape in shapes.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    with ByteProgress(f"convert {source}", total, progress) as bar, write_folder(out) as folder:
        written = write_file(folder / "model.safetensors", tensors, bar.advance)
        _copy_others(path, folder)
        write_state(folder, {"config": asdict(after), "step": 0, "val_loss": None}, {"model.safetensors": written})
    return after


def _copy_others(path: Path, folder: Path) -> None:
    """The tokenizer, and what is needed for the way back to Hugging Face."""
    home = find_tokenizer(path)
    if home is not None:
        for name in TOKENIZER_FILES:
            if (home / name).is_file():
                shutil.copyfile(home / name, folder / name)
    for origin in (path / "huggingface", path, *([home] if home else [])):
        found = [origin / name for name in OTHER_FILES if (origin / name).is_file()]
        if found:
            (folder / "huggingface").mkdir()
            for file in found:
                shutil.copyfile(file, folder / "huggingface" / file.name)
            return
