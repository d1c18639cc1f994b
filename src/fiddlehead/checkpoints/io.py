"""Writes Lightning's state into a checkpoint folder, as `checkpoints.folder` describes it, and reads it back.

Ranks that hold shards share the writing: each tensor is gathered, and one rank keeps and writes it. So a rank needs
main memory for its share and one tensor. In a pipeline the ranks of each stage do this among themselves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from fiddlehead.checkpoints.folder import read_state, read_tensors, verify, write_state, write_together
from fiddlehead.checkpoints.safetensors_files import (
    FORMAT,
    FileChecksum,
    StoredTensor,
    in_order,
    lazy_tensors,
    write_file,
)
from fiddlehead.checkpoints.sharding import ShardedTensor
from fiddlehead.run.team import Team

_TENSOR, _PAIRS = "__tensor__", "__pairs__"
_KEPT = ("optimizer_states", "lr_schedulers", "callbacks", "config", "lora", "init_from", "base", "val_loss", "data")
_KEPT += ("MixedPrecision",)
# The loops' counters are left out: `restore_progress` derives them from the step.
_LIGHTNINGS = ("epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "hparams_name")
_LIGHTNINGS += ("hparams_type", "hyper_parameters", "datamodule_hparams_name", "datamodule_hyper_parameters")


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoints as a folder of safetensors and JSON instead of a pickle.

    Args:
        asynchronous: copy the tensors to main memory, and write them while the run goes on.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.team = Team()
        """Those who save together; all of them have to call `save_checkpoint`."""
        self.pipeline_ranks = 1
        """The number of pipeline stages. The team's ranks are divided equally among them, in order."""
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the folder `path`; on any error, a full disk for one, it leaves nothing there.

        Raises:
            CheckpointNotWrittenError: the disk did not take it, or where this is `asynchronous`, the one before.
        """
        self.wait()
        optimizer: dict[str, torch.Tensor | ShardedTensor] = {}
        state = {key: _encode(checkpoint[key], key, optimizer) for key in _KEPT if key in checkpoint}
        added = {key: checkpoint[key] for key in added_keys(checkpoint)}
        if added:
            state["added"] = _encode(added, "added", optimizer)
        state["step"] = checkpoint["global_step"]
        files = self._own_files("model", checkpoint["state_dict"]) | self._own_files("optimizer", optimizer)
        self.then(partial(write_together, Path(path), self.team, partial(_write, files), partial(_finish, state)))

    def then(self, work: Callable[[], object]) -> None:
        """Does `work` once the checkpoint that was saved last is written; not at all if that fails."""
        if not self.asynchronous:
            work()
            return
        # A daemon: a process that is told to end at once does not wait for a disk.
        self._thread = Thread(target=self._do, args=(work, self._thread), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until what was saved is written.

        Raises:
            CheckpointNotWrittenError: the disk did not take it.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def open_checkpoint(self, path: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """The dictionary that Lightning restores from, its tensors still in their files, except those of callbacks.

        Args:
            state: the content of its `state.json`, if it was read already.

        Raises:
            DamagedCheckpointError: the state cannot be read.
        """
        state = read_state(path) if state is None else state
        tensors = read_tensors(path, state, "optimizer")
        checkpoint = {key: _decode(value, tensors) for key, value in state.items()}
        added = checkpoint.pop("added", {})
        checkpoint |= _load(added) if isinstance(added, dict) else {}
        checkpoint["state_dict"] = read_tensors(path, state, "model")
        checkpoint["global_step"], checkpoint["epoch"] = state["step"], 0
        checkpoint["pytorch-lightning_version"] = "2.6.0"  # what Lightning would migrate from; nothing to migrate here
        checkpoint["callbacks"] = _load(checkpoint.get("callbacks", {}))  # earlier versions have none
        return checkpoint

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads the folder `path` back into the dictionary that Lightning restores from.

        Raises:
            DamagedCheckpointError: a file is missing or is not what was written.
        """
        return _load(self.open_checkpoint(Path(path), verify(Path(path))))

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes the folder `path`."""
        shutil.rmtree(path)

    def _do(self, work: Callable[[], object], before: Thread | None) -> None:
        if before is not None:
            before.join()
        if self._error is None:
            try:
                work()
            except BaseException as error:
                self._error = error

    def _own_files(
        self, kind: str, tensors: Mapping[str, torch.Tensor | ShardedTensor]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The files that this rank writes: their tensors, gathered, and for a thread copied to main memory."""
        holders: dict[int, list[str]] = {0: []}
        for name in in_order(tensors):
            holders.setdefault(getattr(tensors[name], "pipeline_rank", 0), []).append(name)
        ranks = self.team.size // self.pipeline_ranks
        shares = [
            (holder * ranks + rank, names)
            for holder in sorted(holders)
            for rank, names in enumerate(deal({name: tensors[name].nbytes for name in holders[holder]}, ranks))
        ]
        files: dict[str, dict[str, torch.Tensor]] = {}
        for number, (rank, names) in enumerate(shares):
            file = (
                f"{kind}.safetensors" if len(shares) == 1 else f"{kind}-{number + 1:05}-of-{len(shares):05}.safetensors"
            )
            if rank // ranks != self.team.rank // ranks:
                continue
            own = rank == self.team.rank
            if own:
                files[file] = {}
            for name in names:  # in the same order on every rank, as all of them gather
                tensor = tensors[name]
                gathered = isinstance(tensor, ShardedTensor)
                whole = tensor.gather() if gathered else tensor.detach()
                if own:
                    moved = gathered or self.asynchronous
                    files[file][name] = whole.to("cpu", copy=self.asynchronous) if moved else whole
        return files


def deal(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Names in their order, in at most `ranks` shares of about the same size in bytes, of which none is empty."""
    total, at = max(1, sum(sizes.values())), 0
    shares: dict[int, list[str]] = {}
    for name, size in sizes.items():
        shares.setdefault(min(at * ranks // total, ranks - 1), []).append(name)
        at += size
    return list(shares.values()) or [[]]


def _write(files: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> dict[str, FileChecksum]:
    return {
        name: write_file(folder / name, lazy_tensors(tensors), metadata=FORMAT if name.startswith("model") else None)
        for name, tensors in files.items()
    }


def _finish(state: dict[str, Any], folder: Path, written: dict[str, FileChecksum]) -> None:
    write_state(folder, state, written)


def added_keys(checkpoint: Mapping[str, Any]) -> list[str]:
    """What the hooks of callbacks, such as Lightning's `WeightAveraging`, have added to Lightning's dictionary."""
    return [key for key in checkpoint if key not in (*_KEPT, *_LIGHTNINGS)]


def storable(value: Any) -> bool:
    """Whether a checkpoint can keep a value: numbers, texts, tensors, and lists and dictionaries of them."""
    if isinstance(value, dict):
        return all(map(storable, value)) and all(map(storable, value.values()))
    if isinstance(value, list | tuple):
        return all(map(storable, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor | ShardedTensor]) -> Any:
    """The JSON form of `value`; its tensors go into `tensors` under the path that leads to them."""
    if isinstance(value, torch.Tensor | ShardedTensor):
        tensors[name] = value if isinstance(value, ShardedTensor) else value.detach().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        pairs = [(key, _encode(item, f"{name}.{key}", tensors)) for key, item in value.items()]
        return dict(pairs) if all(isinstance(key, str) for key in value) else {_PAIRS: pairs}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        return tensors[value[_TENSOR]]
    if isinstance(value, dict) and _PAIRS in value:
        return {key: _decode(item, tensors) for key, item in value[_PAIRS]}
    if isinstance(value, dict):
        return {key: _decode(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    return value


def _load(value: Any) -> Any:
    """The same with its tensors in memory."""
    if isinstance(value, StoredTensor):
        return value.load()
    if isinstance(value, dict):
        return {key: _load(item) for key, item in value.items()}
    return [_load(item) for item in value] if isinstance(value, list) else value
