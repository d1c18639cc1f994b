from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiddlehead.data import token_writer
from fiddlehead.data.token_file import TokenDatasetInfo, TokenFile
from fiddlehead.data.token_writer import MadeMeanwhileError, TokenDatasetWriter, encode_documents
from fiddlehead.data.tokenizers import ByteTokenizer
from fiddlehead.errors import ConfigError, RunError

TEXTS = ["hello", "wörld", "third"]
IDS = [i for text in TEXTS for i in [*text.encode(), 256]]


class WideTokenizer(ByteTokenizer):
    vocab_size = 70_000


def write(out: Path, tokenizer: ByteTokenizer | None = None, **options: Any) -> TokenDatasetInfo:
    tokenizer = tokenizer or ByteTokenizer()
    with TokenDatasetWriter(out, tokenizer, ["source"], **options) as writer:
        writer.add("train", encode_documents(tokenizer, TEXTS), len(TEXTS), len("".join(TEXTS).encode()))
        return writer.finish()


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_meta(out: Path, **changes: Any) -> None:
    meta = json.loads((out / "meta.json").read_text()) | changes
    (out / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(("tokenizer", "dtype"), [(ByteTokenizer(), "uint16"), (WideTokenizer(), "uint32")])
def test_a_written_dataset_is_read_back(tmp_path: Path, tokenizer: ByteTokenizer, dtype: str) -> None:
    info = write(tmp_path / "data", tokenizer)
    tokens = TokenFile(tmp_path / "data")
    assert info == tokens.info == TokenDatasetInfo.read(tmp_path / "data")
    assert info.dtype == dtype
    assert len(tokens) == len(IDS) == info.train.tokens
    assert (info.train.documents, info.train.bytes) == (3, 16)
    assert tokens.window(2, 7).tolist() == IDS[2:9]
    assert tokens.windows([0, 3], 4).dtype == np.int64
    assert tokens.windows([0, 3], 4).tolist() == [IDS[:4], IDS[3:7]]
    assert inside(tmp_path) == ["data"]
    assert inside(tmp_path / "data") == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_an_empty_split(dataset: Path) -> None:
    assert len(TokenFile(dataset, "val")) == 0


def test_windows_stay_within_the_file(dataset: Path) -> None:
    tokens = TokenFile(dataset)
    for start, length in ((-1, 2), (len(IDS) - 1, 2), (len(IDS), 1)):
        with pytest.raises(IndexError, match=f"not within {len(IDS)} tokens"):
            tokens.window(start, length)


def test_a_pickle_maps_the_file_again(dataset: Path) -> None:
    copy = pickle.loads(pickle.dumps(TokenFile(dataset)))
    assert copy.window(0, 3).tolist() == IDS[:3]
    assert len(pickle.dumps(TokenFile(dataset))) < 500


def test_the_tokenizer_comes_with_it(dataset: Path) -> None:
    tokenizer = TokenFile(dataset).info.open_tokenizer(dataset)
    assert tokenizer.decode(IDS[:5]) == "hello"
    TokenFile(dataset, expect_fingerprint=tokenizer.fingerprint, expect_vocab_size=257)


def test_another_tokenizer_is_refused(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"made with tokenizer .* not with abc"):
        TokenFile(dataset, expect_fingerprint="abc")
    with pytest.raises(ConfigError, match="vocabulary of 257 tokens, not of 1000"):
        TokenFile(dataset, expect_vocab_size=1000)


def test_truncated_and_missing_files(dataset: Path) -> None:
    os.truncate(dataset / "train.bin", 7)
    with pytest.raises(ConfigError, match=rf"train.bin: has 7 bytes, but {len(IDS)} uint16 tokens are {2 * len(IDS)}"):
        TokenFile(dataset)
    (dataset / "train.bin").unlink()
    with pytest.raises(ConfigError, match=r"train\.bin: is missing"):
        TokenFile(dataset)


def test_folders_that_are_no_dataset(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        TokenFile(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"it has no meta\.json"):
        TokenFile(tmp_path / "other")
    for content, message in (('{"a": 1}', "another program"), ("[1]", "another program"), ("{", "cannot be read")):
        (tmp_path / "other" / "meta.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            TokenFile(tmp_path / "other")


def test_other_versions_and_damaged_meta(dataset: Path) -> None:
    edit_meta(dataset, odd=1)
    with pytest.raises(ConfigError, match=r"is damaged: .*odd"):
        TokenFile(dataset)
    edit_meta(dataset, version=99)
    with pytest.raises(ConfigError, match="format version 99; this fiddlehead reads version 1"):
        TokenFile(dataset)


def test_an_unfinished_dataset_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TokenDatasetWriter(tmp_path / "data", ByteTokenizer(), []) as writer:
        writer.add("train", np.zeros(10, dtype=np.uint16), 1, 9)
        assert not (tmp_path / "data").exists()
        raise KeyboardInterrupt
    assert inside(tmp_path) == []


def test_only_token_datasets_are_overwritten(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        write(dataset)
    write(dataset, WideTokenizer(), overwrite=True)
    assert TokenFile(dataset).info.vocab_size == 70_000
    assert inside(tmp_path) == ["data"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="only token datasets are overwritten"):
        write(tmp_path / "thesis", overwrite=True)
    assert inside(tmp_path / "thesis") == ["chapter.txt"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    assert len(TokenFile(tmp_path / "data")) == len(IDS)


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    with TokenDatasetWriter(tmp_path / "data", ByteTokenizer(), []) as slow:
        write(tmp_path / "data")  # sees the other's folder and leaves it alone
        slow.add("train", np.zeros(1, dtype=np.uint16), 1, 0)
        with pytest.raises(MadeMeanwhileError, match="another process has made it"):
            slow.finish()
    assert len(TokenFile(tmp_path / "data")) == len(IDS)
    assert inside(tmp_path) == ["data"]


def _write_and_die(out: Path, after: str) -> None:
    if after == "mkdir":
        token_writer.locks.take = lambda *_: os._exit(9)  # type: ignore[assignment]
    writer = TokenDatasetWriter(out, ByteTokenizer(), [])
    writer.add("train", np.zeros(10, dtype=np.uint16), 1, 9)
    if after == "files":
        token_writer.Path.rename = lambda *_: os._exit(9)  # type: ignore[assignment]
        writer.finish()
    os._exit(9)


@pytest.mark.parametrize("after", ["mkdir", "add", "files"])
def test_what_a_killed_writer_left_is_removed(tmp_path: Path, after: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path / "data", after))
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = inside(tmp_path)
    assert left.startswith(".data.") and left.endswith(".tmp")
    (tmp_path / ".data.0123.tmp").mkdir()  # killed before its first file
    write(tmp_path / "data")
    assert inside(tmp_path) == ["data"]


def test_on_a_full_disk_the_unfinished_dataset_is_removed(tmp_path: Path) -> None:
    with (
        Path("/dev/full").open("wb") as full,
        pytest.raises(RunError, match="the disk is full after 3 tokens; the unfinished dataset was removed"),
        TokenDatasetWriter(tmp_path / "data", ByteTokenizer(), []) as writer,
    ):
        writer._files["val"].close()
        writer._files["val"] = full
        writer.add("val", np.zeros(3, dtype=np.uint16), 1, 2)  # buffered: the disk says no at the end
        writer.finish()
    assert inside(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "file" / "data")
