"""A corpus without a download: the source code of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

from fiddlehead.data.token_file import SPLITS, Split, TokenDatasetInfo
from fiddlehead.data.token_writer import MadeMeanwhileError, TokenDatasetWriter, encode_documents
from fiddlehead.data.tokenizers import BPETokenizer, Tokenizer
from fiddlehead.errors import ConfigError, Problem

# Left out: what is not written by people (tables in encodings, pydoc_data, _sysconfigdata), what differs between
# installations (packages, configuration, what a distribution moves elsewhere), and test data, three times all the rest.
_LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "ensurepip", "idlelib", "lib2to3"}
    | {"tkinter", "turtledemo", "distutils", "__pycache__", "__phello__"}
)
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "_distutils")

_VALIDATION_PERCENT = 3


class StandardLibrary:
    """The `.py` files of the running Python's standard library, some 7 MB, a document each.

    A file belongs to the validation split if the hash of its relative path says so (3 % of the files), so the same
    version of Python has the same splits on every machine.
    """

    name = f"python-{sysconfig.get_python_version()}-stdlib"

    @cached_property
    def identity(self) -> str:
        """A short hash of the names and the contents of all documents."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for path in self._files[split]:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(self._folder).as_posix()} {len(content)}\n".encode())
                digest.update(content)
        return digest.hexdigest()[:16]

    def documents(self, split: Split) -> Iterator[str]:
        """The texts of one split, in the order of their paths."""
        for path in self._files[split]:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a file or two in Latin-1, by their coding line

    @cached_property
    def _folder(self) -> Path:
        return Path(sysconfig.get_paths()["stdlib"])

    @cached_property
    def _files(self) -> dict[Split, list[Path]]:
        files: dict[Split, list[Path]] = {"train": [], "val": []}
        for relative in sorted(_sources(self._folder)):
            bucket = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") % 100
            files["val" if bucket < _VALIDATION_PERCENT else "train"].append(self._folder / relative)
        if not files["train"]:
            message = f"the corpus is Python's standard library, and {self._folder} has no source files"
            raise ConfigError(Problem("corpus", "stdlib", message))
        return files


def _sources(folder: Path) -> Iterator[str]:
    """The paths of the sources relative to `folder`, without a look into what is left out: it may be all packages.

    It yields nothing if the folder does not exist.
    """
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if _is_kept(name)]
        kept = (Path(where, name) for name in files if name.endswith(".py") and _is_kept(name))
        yield from (file.relative_to(folder).as_posix() for file in kept)


def _is_kept(name: str) -> bool:
    return name not in _LEFT_OUT_FOLDERS and not name.startswith(_LEFT_OUT_PREFIXES)


def tokenize_corpus(
    corpus: StandardLibrary, tokenizer: Tokenizer | BPETokenizer, out: str | Path
) -> TokenDatasetInfo | None:
    """Writes `corpus` as a token dataset to `out`, training the tokenizer on its training split if it is untrained.

    Returns None if another process has made `out` meanwhile.
    """
    trained = tokenizer.train(corpus.documents("train")) if isinstance(tokenizer, BPETokenizer) else tokenizer
    with TokenDatasetWriter(out, trained, [corpus.name]) as writer:
        for split in SPLITS:
            for texts in _batches(corpus.documents(split), 64):
                tokens = encode_documents(trained, texts)
                writer.add(split, tokens, len(texts), sum(len(text.encode()) for text in texts))
        try:
            return writer.finish()
        except MadeMeanwhileError:
            return None


def _batches(documents: Iterator[str], size: int) -> Iterator[Sequence[str]]:
    while batch := list(islice(documents, size)):
        yield batch
