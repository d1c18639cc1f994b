"""Megatron's datasets, against files that Megatron-core 0.16.1 wrote, byte by byte."""

from __future__ import annotations

import pickle
import struct
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiddlehead.data.megatron import DTYPES, MegatronIndex, MegatronTokens, prefix_of
from fiddlehead.data.tokenize import tokenize
from fiddlehead.data.tokenizers import ByteTokenizer
from fiddlehead.errors import ConfigError

DOCUMENTS = [[[1, 2, 3, 0]], [[4, 0]], [[5, 6, 7, 8, 9, 0]], [[10], [11, 12]]]
"""The last one has two sequences, and no token at its end."""
TOKENS = [token for document in DOCUMENTS for sequence in document for token in sequence]
ENDS = [3, 5, 11, 14]
GOLDEN_INDEX = bytes.fromhex(
    "4d4d494449445800000100000000000000" "04" "0500000000000000" "0500000000000000"
    "0400000002000000060000000100000002000000"
    "00000000000000001000000000000000180000000000000030000000000000003400000000000000"
    "00000000000000000100000000000000020000000000000003000000000000000500000000000000"
)  # fmt: skip
"""The index of `DOCUMENTS` as Megatron-core's `IndexedDatasetBuilder` writes it for int32."""


def write(prefix: Path, dtype: str = "int32", documents: list[list[list[int]]] = DOCUMENTS, **changes: Any) -> Path:
    """Writes a dataset as the format has it; `changes` replace parts of the index."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    size = np.dtype(dtype).itemsize
    parts = {
        "magic": b"MMIDIDX\x00\x00",
        "version": struct.pack("<Q", 1),
        "code": bytes([next(code for code, name in DTYPES.items() if name == dtype)]),
        "counts": struct.pack("<QQ", len(sequences), len(documents) + 1),
        "lengths": np.array(lengths, "<i4").tobytes(),
        "pointers": np.array([0, *accumulate(size * length for length in lengths)][:-1], "<i8").tobytes(),
        "borders": np.array([0, *accumulate(map(len, documents))], "<i8").tobytes(),
    } | changes
    prefix.with_name(prefix.name + ".idx").write_bytes(b"".join(parts.values()))
    tokens = [token for sequence in sequences for token in sequence]
    prefix.with_name(prefix.name + ".bin").write_bytes(np.array(tokens, np.dtype(dtype).newbyteorder("<")).tobytes())
    return prefix


@pytest.mark.parametrize("dtype", [name for name in DTYPES.values() if not name.startswith("float")])
def test_every_type_of_ids_is_read(dtype: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "text_document", dtype)
    index = MegatronIndex.read(prefix)
    assert (index.dtype, index.documents, index.total) == (dtype, 4, 15)
    tokens = MegatronTokens(prefix, 0, 4)
    windows = tokens.windows([0, 3], 12)
    assert windows.dtype == np.int64
    assert windows.tolist() == [TOKENS[:12], TOKENS[3:15]]


def test_the_index_is_the_one_that_megatron_writes(tmp_path: Path) -> None:
    prefix = write(tmp_path / "text_document")
    assert prefix.with_suffix(".idx").read_bytes() == GOLDEN_INDEX


@pytest.mark.parametrize(("first", "last"), [(0, 4), (1, 3), (3, 4), (2, 2)])
@pytest.mark.parametrize("eos_id", [None, 8])
def test_documents_end_where_the_index_says_and_after_the_end_token(
    first: int, last: int, eos_id: int | None, tmp_path: Path
) -> None:
    tokens = MegatronTokens(write(tmp_path / "text"), first, last, eos_id)
    begin = 0 if first == 0 else ENDS[first - 1] + 1
    own = TOKENS[begin : ENDS[last - 1] + 1] if last > first else []
    assert len(tokens) == len(own)
    for length in range(1, len(own) + 1):
        starts = list(range(len(own) - length + 1))
        windows = tokens.windows(starts, length)
        expected = [[begin + start + t in ENDS or own[start + t] == eos_id for t in range(length)] for start in starts]
        assert tokens.ends(starts, windows).tolist() == expected


@pytest.mark.parametrize("given", ["text_document", "text_document.bin", "text_document.idx", "text.v1"])
def test_a_path_is_the_prefix_or_one_of_the_files(given: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / given.removesuffix(".bin").removesuffix(".idx"))
    assert prefix_of(tmp_path / given) == prefix
    assert prefix_of(tmp_path / "other") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, "oldest format"),
        ({"magic": b"nonsense!"}, "is not an index of Megatron"),
        ({"version": struct.pack("<Q", 2)}, "has format version 2; this fiddlehead reads version 1"),
        ({"code": b"\x09"}, r"has the type code 9; known: 1 \(uint8\)"),
        ({"code": b"\x07"}, "has float32 values, which are not token ids"),
        ({"counts": struct.pack("<QQ", 2**60, 5)}, "is damaged or cut short: it has 134 bytes"),
        ({"counts": struct.pack("<QQ", 5, 0)}, "is damaged or cut short"),
        ({"borders": np.arange(6, dtype="<i8").tobytes()[:20]}, "is damaged or cut short: it has 114 bytes"),
        ({"modes": bytes(5)}, "multimodal datasets are not read"),
        ({"lengths": np.array([4, 2, -6, 1, 2], "<i4").tobytes()}, "sequence 2 has -6 ids"),
        ({"lengths": np.array([4, 2, 7, 1, 2], "<i4").tobytes()}, "sequence 3 begins at byte 48"),
        ({"lengths": np.array([4, 2, 6, 1, 9], "<i4").tobytes()}, r"\.bin: has 60 bytes, and its \.idx says 88"),
        ({"pointers": np.array([0, 24, 16, 48, 52], "<i8").tobytes()}, "sequence 1 begins at byte 24"),
        ({"borders": np.array([0, 2, 1, 3, 5], "<i8").tobytes()}, "not in ascending order"),
        ({"borders": np.array([0, 1, 2, 3, 4], "<i8").tobytes()}, "its documents are the sequences 0 to 4 of 5"),
        ({"borders": np.array([0, 1, 2, 3, 2**40], "<i8").tobytes()}, "its documents are the sequences 0 to"),
    ],
)
def test_what_is_damaged_or_of_another_kind_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "text", **changes)
    with pytest.raises(ConfigError, match=said):
        MegatronTokens(prefix, 0, 1)


@pytest.mark.parametrize("size", [0, 5, 20, 33, 60, 133])
def test_an_index_that_is_cut_anywhere_is_refused(size: int, tmp_path: Path) -> None:
    prefix = write(tmp_path / "text")
    prefix.with_suffix(".idx").write_bytes(GOLDEN_INDEX[:size])
    with pytest.raises(ConfigError, match=r"text\.idx: is "):
        MegatronIndex.read(prefix)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_both_files_are_needed(missing: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "text")
    prefix.with_suffix(missing).unlink()
    assert prefix_of(prefix) == prefix
    with pytest.raises(ConfigError, match=rf"text\{missing}: cannot be read: No such file"):
        MegatronIndex.read(prefix)


def test_a_file_that_has_grown_is_checked_again(tmp_path: Path) -> None:
    prefix = write(tmp_path / "text")
    MegatronIndex.read(prefix)
    with prefix.with_suffix(".bin").open("ab") as file:
        file.write(b"1234")
    with pytest.raises(ConfigError, match="has 64 bytes"):
        MegatronIndex.read(prefix)


def test_an_empty_dataset_has_no_tokens(tmp_path: Path) -> None:
    assert len(MegatronTokens(write(tmp_path / "text", documents=[]), 0, 0)) == 0


def test_ids_outside_a_vocabulary_are_found(tmp_path: Path) -> None:
    tokens = MegatronTokens(write(tmp_path / "text", documents=[[[1, 2]], [[3, -1, 9]]]), 0, 2)
    assert tokens.first_outside(10) == (3, -1)
    assert tokens.first_outside(3) == (2, 3)
    assert MegatronTokens(write(tmp_path / "other"), 0, 4).first_outside(13) is None


def test_a_pickle_maps_the_files_again(tmp_path: Path) -> None:
    copy = pickle.loads(pickle.dumps(MegatronTokens(write(tmp_path / "text"), 1, 3, 0)))
    assert copy.windows([0], 8).tolist() == [TOKENS[4:12]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (70_000, "int32")])
def test_what_tokenize_writes_for_megatron_is_its_format(
    vocab_size: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", vocab_size)
    texts = ["abc", "defg", "h"]
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    options: dict[str, Any] = {"workers": 1, "progress": False, "val_fraction": 0}
    made = tokenize([tmp_path / "t.jsonl"], ByteTokenizer(), tmp_path / "out", megatron=True, **options)
    assert made.dtype == dtype
    same = write(tmp_path / "same", dtype, [[[*text.encode(), 256]] for text in texts])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out/train{suffix}").read_bytes() == same.with_suffix(suffix).read_bytes()
    assert MegatronIndex.read(tmp_path / "out/val").documents == 0
