"""The Lightning data module for pretraining: windows of a token dataset, in an order that depends only on the step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch

from fiddlehead.data.batches import Windows
from fiddlehead.data.checksums import Checksums
from fiddlehead.data.corpus import StandardLibrary, tokenize_corpus
from fiddlehead.data.steps import StepDataModule
from fiddlehead.data.token_file import FORMAT_VERSION, SPLITS, Split, TokenDatasetInfo, TokenFile
from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, no_row
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import cache_folder, user_path
from fiddlehead.recipe.resumable import Resumable

T = TypeVar("T")


class PreTrainingDataModule(StepDataModule):
    """Batches of `seq_length` tokens for next-token prediction.

    `paths` is a folder made by `tokenize`; its tokenizer comes with it, and another one is refused. Without it there is
    nothing to train on, unless `corpus` says what: "stdlib" is the source code of Python's standard library, some 7 MB
    for a demo, tokenized once with `tokenizer` (None: bytes) into `cache_dir`, by default `$FIDDLEHEAD_CACHE` or
    `~/.cache/fiddlehead`.

    A batch is `input_ids` and `labels`, (micro_batch_size, seq_length) int64, where a label is the token that follows,
    and `index`, (micro_batch_size,) int64, the number of the window. Windows cross the borders of documents. A training
    step takes `global_batch_size` windows; which ones is a pure function of `seed` and the step, so a run that
    continues needs no state of its data. Validation sees at most `val_samples` windows, always the same, spread evenly
    over the validation split, and as many on every rank; 0 turns validation off.

    `separate_documents` separates the documents of a window, in training and validation, as if each were alone: a
    token sees only its own document, positions restart with each document, and the token after a document's end is not
    predicted. (So only without this option does a model learn how documents begin, and can write without a prompt.) It
    does what NeMo's `reset_attention_mask`, `reset_position_ids` and `eod_mask_loss` do together, without a mask in
    memory: a batch then also has `cu_seqlens`, int32, and `max_seqlen`, for attention on packed sequences, and -100 for
    labels that do not count.

    A checkpoint keeps the data's checksums. A run goes on with other data only with `allow_changed`.

    Raises one `ConfigError` for all impossible sizes.
    """

    def __init__(
        self,
        paths: str | Path | None = None,
        tokenizer: Tokenizer | BPETokenizer | None = None,
        seq_length: int = 2048,
        micro_batch_size: Resumable[int] = 4,
        global_batch_size: int = 8,
        val_samples: int = 256,
        separate_documents: bool = False,
        num_workers: Resumable[int] = 0,
        seed: int = 1234,
        cache_dir: Resumable[str | Path | None] = None,
        allow_changed: bool = False,
        corpus: Resumable[Literal["stdlib"] | None] = None,
    ) -> None:
        problems = []
        if corpus not in (None, "stdlib"):
            problems.append(Problem("corpus", corpus, "", (None, "stdlib")))
        if isinstance(tokenizer, BPETokenizer) and paths is not None:
            message = "is not trained, and paths is a tokenized folder with its own; leave it out"
            problems.append(Problem("tokenizer", message=message))
        super().__init__(
            seq_length, micro_batch_size, global_batch_size, val_samples, num_workers, seed, problems=problems
        )
        self.paths = None if paths is None else user_path(paths)
        self.separate_documents = separate_documents
        self.cache_dir, self.corpus = cache_dir, corpus
        self.allow_changed = allow_changed
        self._given_tokenizer = ByteTokenizer() if tokenizer is None and paths is None else tokenizer
        self._corpus = StandardLibrary()

    # -- for the model and the task

    @property
    def vocab_size(self) -> int:
        """The number of different tokens; known before anything is built."""
        if self.paths is not None:
            return self.info().vocab_size
        assert self._given_tokenizer is not None
        return self._given_tokenizer.vocab_size

    def checksums(self) -> Checksums:
        """The token files' checksums, compared with those in the dataset's `meta.json`."""
        directory = self._directory()
        with self._naming_paths():
            return {split: [(f"{split}.bin", TokenFile(directory, split).check())] for split in SPLITS}

    @property
    def missing(self) -> str:
        """As in the base: `paths` and `corpus` are None."""
        if self.paths is not None or self.corpus is not None:
            return ""
        return Problem(
            "paths",
            None,
            "there is no data; give data.paths=DIR, which `fiddlehead tokenize` makes, or for a demo "
            "data.corpus=stdlib, 7 MB of Python's source code (`fiddlehead bench` also takes --random-tokens)",
        )

    def too_short(self) -> list[Problem]:
        """As in the base, from the dataset's `meta.json`."""
        if self.paths is None:
            return []
        info = self.info()
        return self._too_short({split: getattr(info, split).tokens for split in SPLITS})

    def _too_short(self, tokens: dict[Split, int]) -> list[Problem]:
        needed = f"needs {self.seq_length + 1} tokens, and the"
        messages = []
        if tokens["train"] <= self.seq_length:
            messages.append(f"{needed} training split of {self._directory()} has {tokens['train']}")
        if tokens["val"] <= self.seq_length and self.val_samples:
            hint = "val_samples=0 trains without validation"
            messages.append(f"{needed} validation split of {self._directory()} has {tokens['val']} ({hint})")
        return [Problem("seq_length", self.seq_length, message) for message in messages]

    def missing_rows(self, vocab_size: int) -> list[str]:
        """As in the base; before the corpus is tokenized, only for the tokens that end and begin documents."""
        if self.vocab_size <= vocab_size:
            return []
        directory = self._directory()
        if directory.exists():
            found = {split: TokenFile(directory, split).first_beyond(vocab_size) for split in SPLITS}
            tokenizer = self.info().open_tokenizer(directory)
            return [
                f"{directory}/{split}.bin: at {first[0]:,} is {no_row(tokenizer, first[1], vocab_size)}"
                for split, first in found.items()
                if first is not None
            ]
        tokenizer = self._given_tokenizer
        if tokenizer is None or isinstance(tokenizer, BPETokenizer):  # learned from the data, so that all occur
            return [f"the tokenizer has {self.vocab_size} tokens, and the model has vocab_size={vocab_size}"]
        ids = dict.fromkeys((*tokenizer.begin_ids, tokenizer.eos_id))
        return [f"each document has {no_row(tokenizer, i, vocab_size)}" for i in ids if i >= vocab_size]

    def info(self) -> TokenDatasetInfo:
        """The dataset's `meta.json`; raises `ConfigError` of `paths` if it is not a dataset."""
        with self._naming_paths():
            return TokenDatasetInfo.read(self._directory())

    # -- Lightning's hooks

    def prepare_data(self) -> None:
        """Tokenizes the corpus unless the cache has it; raises `ConfigError` if there is no data."""
        if self.missing:
            raise ConfigError(self.missing)
        if self.paths is not None or (out := self._directory()).exists():
            return
        assert self._given_tokenizer is not None
        start = time.perf_counter()
        print(f"tokenizing {self._corpus.name}, once", flush=True)  # noqa: T201  Lightning calls this on one rank only
        tokenize_corpus(self._corpus, self._given_tokenizer, out)
        info = TokenDatasetInfo.read(out)
        print(  # noqa: T201
            f"tokenized {self._corpus.name}: {info.train.tokens + info.val.tokens:,} tokens of {info.vocab_size} kinds "
            f"in {time.perf_counter() - start:.1f} s, kept in {out}",
            flush=True,
        )

    def setup(self, stage: str | None = None) -> None:
        """Opens the token files; raises `ConfigError` if they are damaged, too short or another tokenizer's."""
        if not self.val_samples and self.trainer is not None:
            self.trainer.limit_val_batches = 0  # else Lightning warns that there are no batches
        if self._train is not None:
            return
        directory, given = self._directory(), self._given_tokenizer
        fingerprint = None if given is None or isinstance(given, BPETokenizer) else given.fingerprint
        vocab_size = None if given is None else given.vocab_size
        train, val = (
            Windows(
                TokenFile(directory, s, expect_fingerprint=fingerprint, expect_vocab_size=vocab_size),
                self.seq_length,
                separate_documents=self.separate_documents,
            )
            for s in SPLITS
        )
        refuse(self._too_short({"train": len(train.tokens), "val": len(val.tokens)}))
        self.refuse_missing_rows()
        self._train, self._val = train, val
        if given is None or isinstance(given, BPETokenizer):
            self._tokenizer = train.tokens.info.open_tokenizer(directory)
        else:
            self._tokenizer = given
        lengths = self._tokenizer.token_bytes()
        self.token_bytes = None if lengths is None else torch.from_numpy(lengths)

    # -- inside

    @contextmanager
    def _naming_paths(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            raise error.of("paths", self.paths) from error

    def _directory(self) -> Path:
        if self.paths is not None:
            return self.paths
        assert self._given_tokenizer is not None
        key = f"{self._corpus.identity} {self._given_tokenizer.fingerprint} {FORMAT_VERSION}"
        cache = user_path(self.cache_dir) if self.cache_dir else cache_folder()
        return cache / f"{self._corpus.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
