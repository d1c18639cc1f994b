"""The Lightning data module for pretraining: windows of a token dataset, in an order that depends only on the step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fiddlehead.data.batches import Windows
from fiddlehead.data.blend import BlendedBatchSampler, spread
from fiddlehead.data.checksums import Checksums
from fiddlehead.data.contents import Contents, Known
from fiddlehead.data.corpus import StandardLibrary, tokenize_corpus
from fiddlehead.data.sampler import GlobalBatchSampler
from fiddlehead.data.sources import Paths, Source, read_sources
from fiddlehead.data.steps import StepDataModule, opened
from fiddlehead.data.token_file import FORMAT_VERSION, SPLITS, Split, TokenDatasetInfo
from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, no_row
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import cache_folder, user_path
from fiddlehead.recipe.resumable import Resumable


class PreTrainingDataModule(StepDataModule):
    """Batches of `seq_length` tokens for next-token prediction.

    `paths` is a folder made by `tokenize`; its tokenizer comes with it, and another one is refused. Or it is the prefix
    of a Megatron dataset, `PREFIX.bin` and `PREFIX.idx` (docs/training.md); its tokenizer is `tokenizer`, or else the
    `tokenizer.json` beside it. A list of them is one after another, or with a weight before each, as in NeMo, a blend:
    `[30, "a", 70, "b"]`. A mapping has these for "train", "validation" and "test" each. `split` is the parts of a
    Megatron dataset's documents for training, validation and test, None is "900,50,50"; the test part is left alone.

    Without `paths` there is nothing to train on, unless `corpus` says what: "stdlib" is the source code of Python's
    standard library, some 7 MB for a demo, tokenized once with `tokenizer` (None: bytes) into `cache_dir`, by default
    `$FIDDLEHEAD_CACHE` or `~/.cache/fiddlehead`.

    A batch is `input_ids` and `labels`, (micro_batch_size, seq_length) int64, where a label is the token that follows,
    and `index`, (micro_batch_size,) int64, the number of the window. Windows cross the borders of documents. A training
    step takes `global_batch_size` windows; which ones, also of a blend, is a pure function of `seed` and the step, so a
    run that continues needs no state of its data. Validation sees at most `val_samples` windows, always the same,
    spread evenly over the validation split, and as many on every rank; 0 turns validation off.

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
        paths: Paths = None,
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
        split: str | None = None,
    ) -> None:
        problems = []
        self._sources: dict[Split, list[Source]] = {each: [] for each in SPLITS}
        try:
            self._sources = read_sources(paths, split)
        except ConfigError as error:
            problems += error.problems
        if corpus not in (None, "stdlib"):
            problems.append(Problem("corpus", corpus, "", (None, "stdlib")))
        if isinstance(tokenizer, BPETokenizer) and paths is not None:
            message = "is not trained, and what paths names is tokenized already; leave it out"
            problems.append(Problem("tokenizer", message=message))
        super().__init__(
            seq_length, micro_batch_size, global_batch_size, val_samples, num_workers, seed, problems=problems
        )
        self.paths = user_path(paths) if isinstance(paths, str | Path) else paths
        self.split = split
        self.separate_documents = separate_documents
        self.cache_dir, self.corpus = cache_dir, corpus
        self.allow_changed = allow_changed
        self._corpus = StandardLibrary()
        self._corpus_tokenizer: Tokenizer | BPETokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        given = self._corpus_tokenizer if paths is None else tokenizer
        # None if it comes with the data, or is yet to be trained.
        self._given_tokenizer: Tokenizer | None = None if isinstance(given, BPETokenizer) else given

    # -- for the model and the task

    @property
    def vocab_size(self) -> int:
        """The number of different tokens; known before anything is built."""
        if self.paths is not None:
            with self._naming_paths():
                folders = [source.info() for source in self._sources["train"] if source.prefix is None]
            return max(info.vocab_size for info in folders) if folders else self._own_tokenizer().vocab_size
        return self._corpus_tokenizer.vocab_size

    def checksums(self) -> Checksums:
        """The token files' checksums; those of our own folders are compared with their `meta.json`."""
        vocab_size = self.vocab_size
        with self._naming_paths():
            return {
                split: [file for source in sources for file in source.check(vocab_size)]
                for split, sources in self._opened_sources().items()
            }

    @property
    def missing(self) -> str:
        """As in the base: `paths` and `corpus` are None, or one of `paths` is not on this machine."""
        for source in (each for split in SPLITS for each in self._sources[split]):
            if absent := source.absent:
                return Problem("paths", str(source.path), absent)
        if self.paths is not None or self.corpus is not None:
            return ""
        return Problem(
            "paths",
            None,
            "there is no data; give data.paths=DIR, which `fiddlehead tokenize` makes, or for a demo "
            "data.corpus=stdlib, 7 MB of Python's source code (`fiddlehead bench` also takes --random-tokens)",
        )

    def known(self) -> Known:
        """As in the base, from what describes the datasets."""
        packing = "documents kept apart" if self.separate_documents else ""
        if self.missing:
            return Known(packing=packing)
        given = self._corpus_tokenizer if self.paths is None else self._given_tokenizer
        named = "bytes" if given is None else type(given).__name__
        if self.paths is None and not self._directory().exists():
            corpus = (Contents(f"{self._corpus.name}, which the run tokenizes first"),)
            return Known(corpus, corpus, named, self.vocab_size, packing)
        with self._naming_paths():
            train, val = (tuple(self._contents(split)) for split in SPLITS)
            files = [source.tokenizer_file for source in self._opened_sources()["train"]]
        own = next((str(file) for file in files if file is not None), named)
        return Known(train, val, own, self.vocab_size, packing)

    def _contents(self, split: Split) -> Iterator[Contents]:
        """What each dataset of a split has, and its share of the samples if they are a blend."""
        weights = self._weights(split)
        for number, source in enumerate(self._opened_sources()[split]):
            tokens, share = source.size(), None if weights is None else weights[number] / sum(weights)
            yield Contents(str(source.path), tokens, max(0, tokens - 1) // self.seq_length, share=share)

    def too_short(self) -> list[Problem]:
        """As in the base, from what describes the datasets."""
        if self.paths is None:
            return []
        with self._naming_paths():
            sizes: dict[Split, list[int]] = {
                split: [source.size() for source in sources] for split, sources in self._sources.items()
            }
        return self._too_short(sizes)

    def num_samples(self, split: Literal["train", "val"]) -> int | None:
        """As in the base; None also of a blend, whose datasets have epochs of their own."""
        if self.paths is None or self._weights(split) is not None:
            return None
        with self._naming_paths():
            return sum(max(0, source.size() - 1) // self.seq_length for source in self._sources[split])

    def _too_short(self, sizes: dict[Split, list[int]]) -> list[Problem]:
        needed = f"needs {self.seq_length + 1} tokens, and the"
        messages = []
        sources = self._opened_sources()
        for source, tokens in zip(sources["train"], sizes["train"], strict=True):
            if tokens <= self.seq_length:
                messages.append(f"{needed} training split of {source.path} has {tokens}")
        if self.val_samples and all(tokens <= self.seq_length for tokens in sizes["val"]):
            hint = "val_samples=0 trains without validation"
            named = ", ".join(str(source.path) for source in sources["val"]) or "the data"
            messages.append(f"{needed} validation split of {named} has {max(sizes['val'], default=0)} ({hint})")
        return [Problem("seq_length", self.seq_length, message) for message in messages]

    def missing_rows(self, vocab_size: int) -> list[str]:
        """As in the base; before the corpus is tokenized, only for the tokens that end and begin documents."""
        if self.vocab_size <= vocab_size:
            return []
        if self.paths is not None or self._directory().exists():
            with self._naming_paths():
                sources = self._opened_sources()
                found = [source.first_beyond(vocab_size) for split in SPLITS for source in sources[split]]
                tokenizer = self._own_tokenizer()
                # Both splits of Megatron's files are in one file.
                return list(
                    dict.fromkeys(
                        f"{first[0]}: at {first[1]:,} is {no_row(tokenizer, first[2], vocab_size)}"
                        for first in found
                        if first is not None
                    )
                )
        tokenizer = self._given_tokenizer
        if tokenizer is None:  # learned from the data, so that all occur
            return [f"the tokenizer has {self.vocab_size} tokens, and the model has vocab_size={vocab_size}"]
        ids = dict.fromkeys((*tokenizer.begin_ids, tokenizer.eos_id))
        return [f"each document has {no_row(tokenizer, i, vocab_size)}" for i in ids if i >= vocab_size]

    # -- Lightning's hooks

    def prepare_data(self) -> None:
        """Tokenizes the corpus unless the cache has it; raises `ConfigError` if there is no data."""
        if self.missing:
            raise ConfigError(self.missing)
        if self.paths is not None or (out := self._directory()).exists():
            return
        start = time.perf_counter()
        print(f"tokenizing {self._corpus.name}, once", flush=True)  # noqa: T201  Lightning calls this on one rank only
        tokenize_corpus(self._corpus, self._corpus_tokenizer, out)
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
        with self._naming_paths():
            tokenizer = self._own_tokenizer()
            tokens = {
                split: [source.open(tokenizer.eos_id, self._given_tokenizer) for source in sources]
                for split, sources in self._opened_sources().items()
            }
        refuse(self._too_short({s: [len(each) for each in tokens[s]] for s in SPLITS}))
        self.refuse_missing_rows()
        self._train, self._val = (
            Windows(tokens[split], self.seq_length, separate_documents=self.separate_documents) for split in SPLITS
        )
        self._tokenizer = tokenizer
        lengths = tokenizer.token_bytes()
        self.token_bytes = None if lengths is None else torch.from_numpy(lengths)

    # -- inside

    @contextmanager
    def _naming_paths(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            if any(problem.path for problem in error.problems):
                raise
            raise error.of("paths", self.paths) from error

    def _weights(self, split: Split) -> list[float] | None:
        """The weights of a blend; None if the datasets follow each other."""
        weights = [source.weight for source in self._sources[split]]
        return None if None in weights or not weights else [weight for weight in weights if weight is not None]

    def _sampler(self, rank: int, world_size: int, max_steps: int) -> GlobalBatchSampler:
        weights = self._weights("train")
        if weights is None:
            return super()._sampler(rank, world_size, max_steps)
        sizes = self._windows(self._train).sizes
        return BlendedBatchSampler(sizes, weights, **self._sampling(rank, world_size, max_steps))

    def _validation(self, world_size: int) -> np.ndarray:
        weights = self._weights("val")
        if weights is None:
            return super()._validation(world_size)
        chosen = spread(self._windows(self._val).sizes, weights, self.val_samples)
        return chosen[: len(chosen) // world_size * world_size]

    @staticmethod
    def _windows(samples: object) -> Windows:
        found = opened(samples)
        assert isinstance(found, Windows)
        return found

    def _opened_sources(self) -> dict[Split, list[Source]]:
        """The datasets of each split; without `paths`, the tokenized corpus."""
        if self.paths is not None:
            return self._sources
        return {split: [Source(self._directory(), split, None)] for split in SPLITS}

    def _own_tokenizer(self) -> Tokenizer:
        """The tokenizer of the datasets; raises `ConfigError` if none is known, or they have different ones."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        found: dict[str, tuple[Source, Tokenizer]] = {}
        with self._naming_paths():
            for source in self._opened_sources()["train"]:
                if tokenizer := source.tokenizer():
                    found.setdefault(tokenizer.fingerprint, (source, tokenizer))
        if len(found) > 1:
            (one, _), (other, _) = list(found.values())[:2]
            raise ConfigError(Problem("paths", message=f"{one.path} and {other.path} have different tokenizers"))
        if not found:
            message = "Megatron's files come without one; give TokenizerFile, and the path of their tokenizer.json"
            raise ConfigError(Problem("tokenizer", None, message))
        return next(iter(found.values()))[1]

    def _directory(self) -> Path:
        """The folder of the tokenized corpus."""
        key = f"{self._corpus.identity} {self._corpus_tokenizer.fingerprint} {FORMAT_VERSION}"
        cache = user_path(self.cache_dir) if self.cache_dir else cache_folder()
        return cache / f"{self._corpus.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
