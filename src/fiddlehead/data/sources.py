"""The datasets that a recipe names: our own folders and Megatron's files, alone, one after another, or as a blend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fiddlehead.data.checksums import content
from fiddlehead.data.megatron import MegatronIndex, MegatronTokens, prefix_of, prefixes_in
from fiddlehead.data.token_file import SPLITS, Split, TokenDatasetInfo, TokenFile
from fiddlehead.data.tokenizers import Tokenizer, TokenizerFile
from fiddlehead.errors import ConfigError, Problem, nearest
from fiddlehead.files.paths import user_path
from fiddlehead.numbers import is_number

Blended = str | Path | Sequence[str | Path | float]
Paths = Blended | Mapping[str, Blended] | None
"""What `paths` may be."""
DEFAULT_SPLIT = "900,50,50"
"""The parts of Megatron's files for training, validation and test, as in NeMo."""
PARTS: Mapping[str, Split | None] = {"train": "train", "validation": "val", "val": "val", "test": None}
"""The names of the parts in a mapping; nothing here reads the test part."""


class Tokens(Protocol):
    """The tokens of one split of a dataset, one document after another."""

    def __len__(self) -> int: ...

    def windows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """The tokens [start, start + length) for each of `starts`, (len(starts), length) int64."""
        ...

    def ends(self, starts: Sequence[int], windows: np.ndarray) -> np.ndarray:
        """Whether a document ends with each of the tokens of `windows`, which begin at `starts`; bool, as `windows`."""
        ...


@dataclass(frozen=True)
class Source:
    """One split of a dataset that `paths` names."""

    path: Path
    split: Split
    weight: float | None
    """Its part of the blend; None: all datasets of the split follow each other."""
    part: tuple[float, float] = (0.0, 1.0)
    """The documents of Megatron's files that belong to the split, as shares of all."""

    @property
    def prefix(self) -> Path | None:
        """That of Megatron's files; None if it is a folder of ours."""
        return None if (self.path / "meta.json").is_file() else prefix_of(self.path)

    @property
    def absent(self) -> str:
        """What to say of it if it is not on this machine; "" if it is."""
        if self.path.exists() or prefix_of(self.path) is not None:
            return ""
        near = nearest(self.path.name, [prefix.name for prefix in prefixes_in(self.path.parent)])
        hint = f"; did you mean {str(self.path.with_name(near))!r}?" if near else "; `tokenize` makes one"
        return f"is not a dataset: there is no such folder, and no {self.path.name}.bin of Megatron{hint}"

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of the tokenizer that comes with it; None if none does."""
        folder = self.path if self.prefix is None else self.prefix.parent
        file = folder / "tokenizer.json"
        return file if file.is_file() else None

    def info(self) -> TokenDatasetInfo:
        """The description of a folder of ours; raises `ConfigError` if the path is none."""
        if self.path.is_dir() and not (self.path / "meta.json").is_file() and (found := prefixes_in(self.path)):
            message = f"{self.path}: is a folder of Megatron's files; name them by their prefixes"
            raise ConfigError(Problem("", message=message, allowed=found))
        if self.absent:
            raise ConfigError(Problem.in_file(self.path, self.absent))
        return TokenDatasetInfo.read(self.path)

    def documents(self, prefix: Path) -> tuple[int, int]:
        """Which documents of Megatron's files are in the split: the first, and the one after the last.

        The borders are rounded as Megatron does.
        """
        number = MegatronIndex.read(prefix).documents
        first, last = (round(share * float(number)) for share in self.part)
        return first, last

    def open(self, eos_id: int, expected: Tokenizer | None) -> Tokens:
        """The tokens; raises `ConfigError` if the files are damaged, or made with another tokenizer.

        Args:
            eos_id: ends a document of Megatron's files too.
            expected: the tokenizer that a folder of ours must have; None: any.
        """
        if (prefix := self.prefix) is not None:
            return MegatronTokens(prefix, *self.documents(prefix), eos_id)
        self.info()
        if expected is None:
            return TokenFile(self.path, self.split)
        made_with = {"expect_fingerprint": expected.fingerprint, "expect_vocab_size": expected.vocab_size}
        return TokenFile(self.path, self.split, **made_with)

    def size(self) -> int:
        """The number of tokens, as the description or the index says."""
        if (prefix := self.prefix) is None:
            return getattr(self.info(), self.split).tokens
        first, last = self.documents(prefix)
        index = MegatronIndex.read(prefix)
        begin, end = (index.start(int(index.borders[number])) for number in (first, last))
        return end - begin

    def first_beyond(self, vocab_size: int) -> tuple[str, int, int] | None:
        """File, position and id of the first token without a row in a model of `vocab_size`; None if there is none."""
        if (prefix := self.prefix) is None:
            found = TokenFile(self.path, self.split).first_beyond(vocab_size)
            return found and (f"{self.path}/{self.split}.bin", *found)
        found = MegatronTokens(prefix, *self.documents(prefix)).first_outside(vocab_size)
        return found and (f"{prefix}.bin", *found)

    def check(self, vocab_size: int) -> list[tuple[str, str]]:
        """The names and checksums of the files.

        Raises:
            ConfigError: our own file has changed since it was written, or a token id is not below `vocab_size`.
        """
        if self.prefix is None:
            return [(f"{self.split}.bin", TokenFile(self.path, self.split).check())]
        index = MegatronIndex.read(self.prefix)
        found = content(index.bin, index.dtype)
        for number in (found.max_id, found.min_id):
            if index.total and not 0 <= number < vocab_size:
                message = f"has the token id {number}, and the tokenizer has {vocab_size} tokens"
                raise ConfigError(Problem.in_file(index.bin, message))
        return [(index.bin.name, found.sha256), (index.files[1].name, content(index.files[1]).sha256)]

    def tokenizer(self) -> TokenizerFile | None:
        """The tokenizer that comes with it; None if none does."""
        if self.prefix is None:
            return self.info().open_tokenizer(self.path)
        return None if self.tokenizer_file is None else TokenizerFile(self.tokenizer_file)


def read_sources(paths: Paths, split: str | None) -> dict[Split, list[Source]]:
    """The datasets of each split that `paths` names; no file is read.

    Raises:
        ConfigError: `paths` or `split` has no meaning; with all problems.
    """
    if paths is None:
        if split is not None:
            raise ConfigError(Problem("split", split, "there are no paths to split"))
        return {each: [] for each in SPLITS}
    if isinstance(paths, Mapping):
        return _of_mapping(paths, split)
    given = _weighted(paths)
    shares = _shares(DEFAULT_SPLIT if split is None else split)
    parts = dict(zip(SPLITS, pairwise(shares), strict=False))  # the third is for tests
    if split is not None and (folders := [str(path) for path, _ in given if (path / "meta.json").is_file()]):
        message = f"`fiddlehead tokenize` has split {', '.join(folders)} already; split is for Megatron's files"
        raise ConfigError(Problem("split", split, message))
    return {each: [Source(path, each, weight, parts[each]) for path, weight in given] for each in SPLITS}


def _of_mapping(paths: Mapping[str, Any], split: str | None) -> dict[Split, list[Source]]:
    problems = [Problem.unknown("paths", name, "part", PARTS) for name in paths if name not in PARTS]
    if "train" not in paths:
        problems.append(Problem("paths", message="has no 'train'"))
    if split is not None:
        problems.append(Problem("split", split, "paths names the files of each part already"))
    found: dict[Split, list[Source]] = {each: [] for each in SPLITS}
    for name, given in paths.items():
        each = PARTS.get(name)
        if each is None:
            continue
        try:
            found[each] += [Source(path, each, weight) for path, weight in _weighted(given)]
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return found


def _weighted(given: Blended) -> list[tuple[Path, float | None]]:
    """The paths with their weights: a list has either a weight before each path, as in NeMo, or none."""
    if isinstance(given, str | Path):
        return [(user_path(given), None)]
    if not given:
        raise ConfigError(Problem("paths", message="is empty"))
    heads = [_number(each) for each in given[::2]]
    if len(given) % 2 or all(head is None for head in heads):
        if wrong := [each for each in given if not isinstance(each, str | Path)]:
            raise ConfigError(Problem("paths", list(given), f"{wrong[0]!r} is a weight without a path behind it"))
        return [(user_path(str(path).strip()), None) for path in given]
    problems = []
    for head, weight in zip(given[::2], heads, strict=True):
        if weight is None or not weight > 0:
            problems.append(Problem("paths", list(given), f"{str(head)!r} must be a weight above 0, before its path"))
    if wrong := [each for each in given[1::2] if not isinstance(each, str | Path)]:
        problems.append(Problem("paths", list(given), f"{wrong[0]!r} stands where a path must be"))
    if problems:
        raise ConfigError(*problems)
    return [(user_path(str(path).strip()), weight) for path, weight in zip(given[1::2], heads, strict=True)]


def _number(given: object) -> float | None:
    """A weight, which may be a text; None for anything else."""
    try:
        number = float(given) if isinstance(given, str) else given
    except ValueError:
        return None
    return float(number) if is_number(number) else None  # type: ignore[arg-type]


def _shares(split: str) -> list[float]:
    """Where each of the three parts begins and the last ends, from 0 to 1."""
    try:
        numbers = [float(number) for number in split.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(is_number(n) and n >= 0 for n in numbers) or not sum(numbers):
        message = f"must be up to three numbers of 0 or more: training, validation and test, such as {DEFAULT_SPLIT}"
        raise ConfigError(Problem("split", split, message))
    numbers += [0.0] * (3 - len(numbers))
    shares, total = [0.0], sum(numbers)
    for number in numbers:
        shares.append(shares[-1] + number / total)
    return shares
