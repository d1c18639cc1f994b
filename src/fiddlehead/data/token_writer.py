"""Writes token datasets so that what can be opened is complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from fiddlehead.data.megatron import IndexWriter
from fiddlehead.data.pieces import PIECE
from fiddlehead.data.token_file import SPLITS, Split, SplitInfo, TokenDatasetInfo
from fiddlehead.data.tokenizers import Tokenizer, save_tokenizer
from fiddlehead.errors import FULL_DISK, ConfigError, Problem, RunError
from fiddlehead.files.atomic import sync
from fiddlehead.files.paths import user_path
from fiddlehead.run import locks


class MadeMeanwhileError(ConfigError):
    """Another process has made the dataset while this one was at work on it."""


class TokenDatasetWriter:
    """Writes a token dataset beside its final place `out` and moves it there when it is complete.

    A context manager: leaving it without `finish` removes what was written. A killed process leaves a temporary folder
    `.NAME.*.tmp`, which the next writer of the same `out` removes. Raises `ConfigError` when `out` exists, unless
    `overwrite` is set and it is a token dataset, and `RunError` when the disk is full.

    Args:
        megatron: also write the index with which Megatron reads each split.
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: Tokenizer,
        sources: Sequence[str],
        *,
        overwrite: bool = False,
        megatron: bool = False,
    ) -> None:
        self.out = user_path(out)
        check_destination(self.out, overwrite)
        self._tokenizer = tokenizer
        self._sources = tuple(sources)
        self._overwrite = overwrite
        self._dtype = _token_dtype(tokenizer.vocab_size)
        if megatron and self._dtype == "uint32":
            self._dtype = "int32"
        self._indices = {split: IndexWriter(self._dtype) for split in SPLITS} if megatron else {}
        self._totals = {split: [0, 0, 0] for split in SPLITS}  # tokens, documents, bytes
        self._max_ids: dict[Split, int] = {}
        self._hashes = {split: hashlib.sha256() for split in SPLITS}
        with self._disk_errors():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(self.out)
            self._temporary, train = _create_temporary(self.out)
            self._files: dict[Split, IO[bytes]] = {"train": train, "val": (self._temporary / "val.bin").open("wb")}

    def add(
        self, split: Split, tokens: np.ndarray, documents: int, num_bytes: int, lengths: Sequence[int] = ()
    ) -> None:
        """Appends `documents` encoded documents, which were `num_bytes` of UTF-8 text.

        Args:
            lengths: the tokens of each document; Megatron's index needs them.
        """
        data = tokens.tobytes()
        if self._indices:
            assert sum(lengths) == len(tokens), "an index needs the length of every document"
            self._indices[split].add(lengths)
        with self._disk_errors():
            self._files[split].write(data)
        self._hashes[split].update(data)
        if len(tokens):
            self._max_ids[split] = max(self._max_ids.get(split, 0), int(tokens.max()))
        self._totals[split] = [
            a + b for a, b in zip(self._totals[split], (len(tokens), documents, num_bytes), strict=True)
        ]

    def finish(self) -> TokenDatasetInfo:
        """Makes the dataset durable and moves it to `out`. Raises `MadeMeanwhileError` if another came first."""
        splits = {
            s: SplitInfo(*self._totals[s], sha256=self._hashes[s].hexdigest(), max_id=self._max_ids.get(s, 0))
            for s in SPLITS
        }
        info = TokenDatasetInfo(
            dtype=self._dtype,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            tokenizer=self._tokenizer.fingerprint,
            sources=self._sources,
            train=splits["train"],
            val=splits["val"],
        )
        with self._disk_errors():
            save_tokenizer(self._tokenizer, self._temporary)
            (self._temporary / "meta.json").write_text(info.text(), encoding="utf-8")
            for split, index in self._indices.items():
                with (self._temporary / f"{split}.idx").open("wb") as file:
                    index.write(file)
            for file in self._files.values():
                file.flush()
            for path in (*self._temporary.iterdir(), self._temporary):
                sync(path)
            self._move_into_place()
        return info

    def _move_into_place(self) -> None:
        replaced = self._temporary.with_name(self._temporary.name.removesuffix(".tmp") + ".old.tmp")
        if self._overwrite and self.out.exists():
            self.out.rename(replaced)
        try:
            self._temporary.rename(self.out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise MadeMeanwhileError(Problem("out", self.out, "another process has made it meanwhile")) from None
            raise
        sync(self.out.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def __enter__(self) -> TokenDatasetWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        # The lock goes with the open file, so what is unfinished is removed first.
        shutil.rmtree(self._temporary, ignore_errors=True)
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk again: what could not be written is gone anyway
                file.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL_DISK:
                tokens = sum(total[0] for total in self._totals.values())
                message = f"the disk is full after {tokens} tokens; the unfinished dataset was removed"
                raise RunError(Problem("out", self.out, message)) from error
            raise ConfigError(Problem("out", self.out, f"cannot be written: {error}")) from error


def check_destination(out: Path, overwrite: bool) -> None:
    """Raises `ConfigError` if a dataset may not be written to `out`."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ConfigError(Problem("out", out, "exists; choose another folder, or overwrite it"))
    try:
        TokenDatasetInfo.read(out)
    except ConfigError as error:
        raise ConfigError(Problem("out", out, f"only token datasets are overwritten: {error}")) from None


def remove_stale(out: Path) -> None:
    """Removes the temporary folders that killed writers of `out` left behind; a live writer's is locked and stays."""
    for folder in out.parent.glob(f".{out.name}.*.tmp"):
        try:
            with (folder / "train.bin").open("rb") as lock:
                if locks.take(lock):
                    shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                folder.rmdir()  # killed before its first file; fails, as it should, if a writer just made one


def _create_temporary(out: Path) -> tuple[Path, IO[bytes]]:
    """A new folder beside `out` and its open `train.bin`, whose lock says for as long as it is open: in use."""
    while True:
        folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        try:
            file = (folder / "train.bin").open("xb")
        except FileNotFoundError:
            continue  # another writer has taken the folder for stale, as it was not locked yet
        if locks.take(file) and (folder / "train.bin").exists():
            return folder, file
        file.close()


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """The tokens of all `texts`, (tokens,) of uint16 or uint32, as `encode_each` makes them."""
    dtype = np.dtype(_token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    return np.concatenate([np.empty(0, dtype=dtype), *encode_each(tokenizer, texts)])


def encode_each(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text, (tokens,) of uint16 or uint32.

    Each has the tokenizer's `begin_ids` in front, and the end-of-document token behind it. Where that is the one that
    begins, too, the end of the document before is enough.
    """
    eos = [tokenizer.eos_id]
    begin = [] if tokenizer.begin_ids == eos else tokenizer.begin_ids
    dtype = np.dtype(_token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    short = [text for text in texts if len(text) <= PIECE]
    encoded = iter(tokenizer.encode_batch(short))
    found: list[np.ndarray] = []
    for text in texts:
        if len(text) <= PIECE:
            found.append(np.array(begin + next(encoded) + eos, dtype=dtype))
        else:
            middle = (tokenizer.encode_batch([piece])[0] for piece in tokenizer.pieces(text))
            found.append(np.concatenate([np.array(ids, dtype=dtype) for ids in chain([begin], middle, [eos])]))
    return found


def _token_dtype(vocab_size: int) -> str:
    """The narrowest type that holds the token ids."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
