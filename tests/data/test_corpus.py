from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from fiddlehead.data.corpus import StandardLibrary, tokenize_corpus
from fiddlehead.data.token_file import TokenFile
from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer
from fiddlehead.errors import ConfigError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library."""
    folder = tmp_path / "lib"
    for name in ("argparse.py", "json/decoder.py", "test/test_json.py", "json/tests/a.py", "site-packages/b.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name} é\n" * 10)
    for i in range(200):
        (folder / f"m{i}.py").write_text(f"x = {i}\n")
    (folder / "_sysconfigdata_linux.py").write_text("HOME = '/somewhere'\n")
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


def test_the_corpus_has_only_library_sources_split_by_file(library: Path) -> None:
    corpus = StandardLibrary()
    train, val = (list(corpus.documents(split)) for split in ("train", "val"))
    assert len(train) + len(val) == 202  # not the tests, the packages, the machine's data, nor Latin-1
    assert 1 <= len(val) <= 20
    assert not set(train) & set(val)
    assert train == list(StandardLibrary().documents("train"))


def test_the_split_of_a_file_does_not_depend_on_the_others(library: Path) -> None:
    before = set(StandardLibrary().documents("val"))
    for i in range(0, 200, 2):
        (library / f"m{i}.py").unlink()
    assert set(StandardLibrary().documents("val")) <= before


def test_the_identity_follows_the_contents(library: Path) -> None:
    identity = StandardLibrary().identity
    assert StandardLibrary().identity == identity
    (library / "m5.py").write_text("x = 6\n")
    assert StandardLibrary().identity != identity


def test_a_python_without_sources_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"^corpus='stdlib': .* has no source files"):
        list(StandardLibrary().documents("train"))


def test_the_corpus_of_this_python_is_large_enough() -> None:
    corpus = StandardLibrary()
    sizes = {split: sum(map(len, corpus.documents(split))) for split in ("train", "val")}
    assert sizes["train"] > 4_000_000
    assert 0.01 < sizes["val"] / sizes["train"] < 0.1


def test_the_tokenized_corpus_has_the_same_text(library: Path, tmp_path: Path) -> None:
    corpus, tokenizer = StandardLibrary(), ByteTokenizer()
    info = tokenize_corpus(corpus, tokenizer, tmp_path / "out")
    for split in ("train", "val"):
        documents = list(corpus.documents(split))
        tokens = TokenFile(tmp_path / "out", split)
        ids = tokens.window(0, len(tokens)).tolist()
        assert ids == [i for text in documents for i in [*text.encode(), 256]]
        counted = getattr(info, split)
        assert (counted.documents, counted.tokens, counted.bytes) == (
            len(documents),
            len(ids),
            len(ids) - len(documents),
        )


def test_an_untrained_tokenizer_is_trained_on_it(library: Path, tmp_path: Path) -> None:
    info = tokenize_corpus(StandardLibrary(), BPETokenizer(262), tmp_path / "out")
    assert info is not None and info.vocab_size == 262
    assert TokenFile(tmp_path / "out").info.open_tokenizer(tmp_path / "out").vocab_size == 262
