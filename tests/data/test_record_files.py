"""Files of rows: lines and arrays of JSON, compressed or not, and Parquet."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fiddlehead.data.records import read_records
from fiddlehead.errors import ConfigError
from tests.data.test_records import CHAT, COMPLETION


def compressed(path: Path, content: bytes) -> Path:
    """A file of this content, compressed as its suffix says."""
    if path.suffix.lower() == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonl.gz", "a.jsonl.zst", "a.NDJSON.ZST", "a.json", "a.json.gz"])
def test_lines_are_read_from_files_of_all_kinds(name: str, tmp_path: Path) -> None:
    content = "\n\n".join(json.dumps(example) for example in (CHAT, CHAT)).encode()
    records = read_records([compressed(tmp_path / name, content)], preference=False)
    assert [(record.values, record.where) for record in records] == [
        (CHAT, f"{tmp_path / name}:1"), (CHAT, f"{tmp_path / name}:3")
    ]  # fmt: skip


def test_an_upper_case_parquet_file_is_read(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT]), tmp_path / "a.PARQUET")
    assert [each.values for each in read_records([tmp_path / "a.PARQUET"], preference=False)] == [CHAT]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.JSON.zst"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_and_its_elements_are_named_by_line(name: str, indent: int | None, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf \n" + json.dumps([COMPLETION, COMPLETION], indent=indent).encode() + b"\n"
    records = read_records([compressed(tmp_path / name, content)], preference=False)
    assert [record.values for record in records] == [COMPLETION] * 2
    assert [int(record.where.rpartition(":")[2]) for record in records] == ([2, 2] if indent is None else [3, 7])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'[{"prompt": "a", "completion": "b"},\n{"prompt": }]',
            "a.json: cannot be read: not a JSON array: line 2, column",
        ),
        (
            b'[{"prompt": "a", "completion": "b"}\n{}]',
            "line 2: an element is followed by neither a comma nor a bracket",
        ),
        (b'[{"prompt": "a", "completion": "b"},\n]', "line 2, column 1"),
        (b'[{"prompt": "a", "completion": "b"}', "line 1: an element is followed by"),
        (b'[{"prompt": "a", "completion": "b"}] x', "line 1: something follows its end"),
        (b'[{"prompt": "a", "completion": "b"},\n3]', "a.json:2: is a number, not an object with fields"),
        (b'[{"prompt": "a", "completion": "\\ud800"}]', "a.json:1: is not valid Unicode"),
        (b'[\n"\xff"]', "not UTF-8: byte 0xff"),
        (b"[" + b"[" * 100_000, "nested too deep"),
        (b" []", "there is no example"),
    ],
)
def test_a_broken_array_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_records([tmp_path / "a.json"], preference=False)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.json.zst"])
def test_a_file_that_cannot_be_decompressed_is_named(name: str, tmp_path: Path) -> None:
    whole = compressed(tmp_path / name, json.dumps(CHAT).encode() * 100).read_bytes()
    for content in (whole[: len(whole) // 2], b"no archive"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            read_records([tmp_path / name], preference=False)
