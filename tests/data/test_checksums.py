"""A file's checksum is computed once, and changed files are named."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fiddlehead.data import ByteTokenizer, FineTuningDataModule, PreTrainingDataModule, checksums
from fiddlehead.data.checksums import Content, content, differences, of_paths
from fiddlehead.data.token_file import TokenFile
from fiddlehead.data.token_writer import TokenDatasetWriter
from fiddlehead.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def age(file: Path, seconds: float = 60) -> None:
    os.utime(file, (time.time(), time.time() - seconds))


def dataset(out: Path, ids: list[int], dtype: type = np.uint16, vocab_size: int = 257) -> Path:
    class Sized(ByteTokenizer):
        pass

    Sized.vocab_size = vocab_size
    with TokenDatasetWriter(out, Sized(), []) as writer:
        for split in ("train", "val"):
            writer.add(split, np.array(ids, dtype=dtype), 1, len(ids))
        writer.finish()
    return out


@pytest.mark.parametrize("size", [0, 2, 2 * (1 << 22) + 6])
def test_a_file_is_read_once_until_its_size_time_or_inode_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    file = tmp_path / "file"
    data = np.arange(size // 2, dtype="<u2")
    file.write_bytes(data.tobytes())
    age(file)
    expected = Content(hashlib.sha256(data.tobytes()).hexdigest(), int(data.max(initial=0)) if size else -1)
    assert content(file, "uint16") == expected
    with monkeypatch.context() as patch:
        patch.delattr(checksums, "_read")
        assert content(file, "uint16") == expected
        age(file, 30)
        with pytest.raises(NameError):
            content(file, "uint16")
    file.write_bytes(b"other")
    assert content(file).sha256 == hashlib.sha256(b"other").hexdigest()


def test_a_file_written_this_moment_is_read_again(tmp_path: Path, cache: Path) -> None:
    """A change right after the check could have the same time."""
    (tmp_path / "file").write_bytes(b"ab")
    content(tmp_path / "file")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"ab")
    age(tmp_path / "file")
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "file" / "cache"))
    assert content(tmp_path / "file") == Content(hashlib.sha256(b"ab").hexdigest())
    assert "not kept" in caplog.text


A, B = ("a", "1"), ("b", "2")


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ([A, B], []),
        ([("renamed", "1"), B], []),
        ([A, ("b", "3")], ["paths: b is new or changed"]),
        ([A], ["paths: b is missing"]),
        ([A, B, ("c", "3")], ["paths: c is new or changed"]),
        ([B, A], ["paths: the files are in another order, or another number of times"]),
        ([A, B, B], ["paths: the files are in another order, or another number of times"]),
        ([], ["paths: a is missing", "paths: b is missing"]),
    ],
)
def test_files_that_changed_are_named(now: list[tuple[str, str]], found: list[str]) -> None:
    before = {"paths": [list(each) for each in (A, B)]}  # as JSON has it
    assert sorted(differences(before, {"paths": now})) == found


def flip(file: Path) -> None:
    changed = bytearray(file.read_bytes())
    changed[2] ^= 1
    file.write_bytes(changed)


def test_flipped_tokens_are_refused_by_name(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", [1, 2, 3, 256])
    data = PreTrainingDataModule(folder, seq_length=2)
    sums = data.checksums()
    assert sums["train"] == [("train.bin", hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest())]
    flip(folder / "train.bin")
    with pytest.raises(ConfigError, match=r"train\.bin: is not what was written: its SHA-256 is .*; tokenize again"):
        data.checksums()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_beyond_the_vocabulary_are_refused_though_the_checksum_is_right(tmp_path: Path, dtype: type) -> None:
    vocab_size = 257 if dtype is np.uint16 else 70_000
    folder = dataset(tmp_path / "data", [1, vocab_size], dtype, vocab_size)
    with pytest.raises(ConfigError, match=rf"token id {vocab_size}, and its meta\.json says vocab_size={vocab_size}"):
        TokenFile(folder).check()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: flip(folder / "a.jsonl"), ["paths: a.jsonl is new or changed"]),
        (lambda folder: flip(folder / "saved" / "x.arrow"), ["paths: saved/x.arrow is new or changed"]),
        (lambda folder: (folder / "saved" / "x.arrow").unlink(), ["paths: saved/x.arrow is missing"]),
        (lambda folder: flip(folder / "val.jsonl"), ["val_paths: val.jsonl is new or changed"]),
        (lambda folder: age(folder / "a.jsonl"), []),
    ],
)
def test_changed_examples_are_named(tmp_path: Path, change: Callable[[Path], object], found: list[str]) -> None:
    (tmp_path / "saved").mkdir()
    for name in ("a.jsonl", "saved/x.arrow", "val.jsonl"):
        (tmp_path / name).write_text(f"some text of {name}")
    data = FineTuningDataModule([tmp_path / "a.jsonl", tmp_path / "saved"], val_paths=tmp_path / "val.jsonl")
    before = data.checksums()
    change(tmp_path)
    assert differences(before, data.checksums()) == found


def test_files_may_move(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.jsonl").write_text("text")
    before = of_paths([tmp_path / "here"])
    (tmp_path / "here").rename(tmp_path / "there")
    assert not differences({"paths": before}, {"paths": of_paths([tmp_path / "there"])})
