"""Turns text files into a token dataset, in several processes; their number does not change the result."""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fiddlehead.data.progress import ByteProgress
from fiddlehead.data.readers import Block, find_files, parse, read_blocks
from fiddlehead.data.token_file import SPLITS, Split, TokenDatasetInfo
from fiddlehead.data.token_writer import TokenDatasetWriter, check_destination, encode_each
from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, TokenizerFile
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.run.processes import usable_cpus

_MAX_PROBLEMS = 20


def tokenize(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer | BPETokenizer,
    out: str | Path,
    *,
    val_fraction: float = 0.01,
    workers: int | None = None,
    text_field: str = "text",
    overwrite: bool = False,
    megatron: bool = False,
    progress: bool = True,
) -> TokenDatasetInfo:
    """Writes the documents of `paths` as a token dataset to the folder `out`.

    `paths` are files or folders: text files (a document each), JSON objects (`.jsonl` or `.json`: one a line, or an
    array in `.json`; also with `.gz` or `.zst`), whose `text_field` is the document, and `.parquet` (a row each).
    Empty documents are left out. A document belongs to the validation split if its hash falls into `val_fraction`, so
    copies of a document are never in both splits. An untrained tokenizer first learns from the training split.
    `workers` processes, by default one for each core, encode; the files do not depend on their number. With `megatron`
    the folder has an index for each split too, with which Megatron reads the prefixes `out/train` and `out/val`.

    Afterwards `out` is complete or absent: a call that fails or is interrupted removes its files, and the next call
    removes those of a killed one. Raises `ConfigError` for bad input, with file and line of the first 20 problems and
    the number of the others.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(Problem("val_fraction", val_fraction, "must be at least 0 and below 1"))
    if workers is not None and workers < 1:
        raise ConfigError(Problem("workers", workers, "must be 1 or more"))
    out = user_path(out)
    files = find_files(paths)
    check_destination(out, overwrite)
    if isinstance(tokenizer, BPETokenizer):
        with ByteProgress(f"training {tokenizer.vocab_size} tokens", _total_bytes(files), progress) as bar:
            trained = tokenizer.train(_training_texts(files, text_field, val_fraction, bar))
    else:
        trained = tokenizer
    encoder = _Encoder(trained, text_field, val_fraction)
    with (
        TokenDatasetWriter(
            out, trained, [str(path) for path in paths], overwrite=overwrite, megatron=megatron
        ) as writer,
        ByteProgress("tokenizing", _total_bytes(files), progress) as bar,
    ):
        _write_all(files, encoder, workers or usable_cpus(), writer, bar)
        return writer.finish()


def parse_tokenizer(text: str, eos: str | None = None) -> Tokenizer | BPETokenizer:
    """The tokenizer that a command line names: `bytes`, `bpe:4096` (to be trained), or a path for `TokenizerFile`.

    Args:
        eos: the token that ends a document, of a file's.
    """
    if eos is not None and (text == "bytes" or text.startswith("bpe:")):
        raise ConfigError(Problem("eos", eos, f"is only for a tokenizer.json; {text} has its own end"))
    kind, colon, size = text.partition(":")
    if text == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        if not colon or not size.isdecimal():
            raise ConfigError(Problem("tokenizer", text, "must be bpe:SIZE, such as bpe:4096"))
        return BPETokenizer(int(size))
    if not user_path(text).exists():
        message = "there is no such file; give bytes, bpe:SIZE, or the path of a tokenizer.json"
        raise ConfigError(Problem("tokenizer", text, message))
    return TokenizerFile(text, eos=eos)


class _Encoded(NamedTuple):
    """An encoded block: for each split its tokens, the lengths of its documents, and their bytes of text."""

    splits: dict[Split, tuple[np.ndarray, list[int], int]]
    problems: list[Problem]
    size: int


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    text_field: str
    val_fraction: float

    def __call__(self, block: Block, check_only: bool) -> _Encoded:
        texts, problems = parse(block, self.text_field)
        if check_only or problems:
            return _Encoded({}, problems, block.size)
        by_split: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for text in texts:
            by_split[_split_of(text, self.val_fraction)].append(text)
        try:
            splits: dict[Split, tuple[np.ndarray, list[int], int]] = {
                split: self._encoded(texts) for split, texts in by_split.items() if texts
            }
        except ConfigError as error:  # a document that is too long to tokenize at once
            return _Encoded({}, [Problem.in_file(block.path, problem) for problem in error.problems], block.size)
        return _Encoded(splits, [], block.size)

    def _encoded(self, texts: Sequence[str]) -> tuple[np.ndarray, list[int], int]:
        documents = encode_each(self.tokenizer, texts)
        lengths = [len(tokens) for tokens in documents]
        return np.concatenate(documents), lengths, sum(len(text.encode()) for text in texts)


class _Problems:
    """Collects the problems of the input: the first ones, and the number of all."""

    def __init__(self) -> None:
        self._first: list[Problem] = []
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, problems: Sequence[Problem]) -> None:
        self._first += problems[: _MAX_PROBLEMS - len(self._first)]
        self._count += len(problems)

    def check(self) -> None:
        """Raises one `ConfigError` if there are problems."""
        rest = self._count - len(self._first)
        refuse([*self._first, *([Problem("", message=f"and {rest} more")] if rest else [])])


def _write_all(
    files: Sequence[Path], encoder: _Encoder, workers: int, writer: TokenDatasetWriter, bar: ByteProgress
) -> None:
    problems = _Problems()
    documents: Counter[Split] = Counter()
    for encoded in _encode_all(_all_blocks(files, encoder.text_field, problems), encoder, workers, problems):
        problems.add(encoded.problems)
        bar.advance(encoded.size)
        if not problems:
            for split, (tokens, lengths, num_bytes) in encoded.splits.items():
                writer.add(split, tokens, len(lengths), num_bytes, lengths)
                documents[split] += len(lengths)
    problems.check()
    if not documents:
        raise ConfigError(Problem("paths", message="all documents are empty"))
    if not documents["train"]:
        message = f"by their hashes, all {documents['val']} documents are for validation; give less, or 0"
        raise ConfigError(Problem("val_fraction", encoder.val_fraction, message))


def _all_blocks(files: Sequence[Path], text_field: str, problems: _Problems) -> Iterator[Block]:
    for file in files:
        try:
            yield from read_blocks(file, text_field)
        except ConfigError as error:
            problems.add(error.problems)


def _encode_all(blocks: Iterator[Block], encoder: _Encoder, workers: int, problems: _Problems) -> Iterator[_Encoded]:
    """The blocks encoded, in their order; once there are problems the rest is only checked for more."""
    if workers == 1:
        yield from (encoder(block, bool(problems)) for block in blocks)
        return
    # Spawned: a fork would copy the threads' locks of whoever calls, and the tokenizers library's among them.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,))
    try:
        waiting: deque[Future[_Encoded]] = deque()
        for block in blocks:
            waiting.append(pool.submit(_encode_in_worker, block, bool(problems)))
            if len(waiting) > 2 * workers:  # enough to keep all busy, and no more in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        message = "one was killed, probably because memory ran out; try fewer"
        raise ConfigError(Problem("workers", workers, message)) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: _Encoder


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(block: Block, check_only: bool) -> _Encoded:
    return _worker_encoder(block, check_only)


def _training_texts(files: Sequence[Path], text_field: str, val_fraction: float, bar: ByteProgress) -> Iterator[str]:
    """The documents of the training split; raises `ConfigError` at the end if any are bad."""
    problems = _Problems()
    for block in _all_blocks(files, text_field, problems):
        texts, bad = parse(block, text_field)
        problems.add(bad)
        yield from (text for text in texts if _split_of(text, val_fraction) == "train")
        bar.advance(block.size)
    problems.check()


def _split_of(text: str, val_fraction: float) -> Split:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def _total_bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)
