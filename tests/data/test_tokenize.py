from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fiddlehead.data import readers
from fiddlehead.data.token_file import TokenDatasetInfo, TokenFile
from fiddlehead.data.tokenize import parse_tokenizer, tokenize
from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer, TokenizerFile
from fiddlehead.errors import ConfigError
from tests.data.test_record_files import compressed

pytestmark = pytest.mark.filterwarnings("error")


def write_lines(path: Path, records: list[Any]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def run(paths: list[Path], out: Path, **options: Any) -> TokenDatasetInfo:
    defaults: dict[str, Any] = {"val_fraction": 0, "workers": 1, "progress": False}
    return tokenize(paths, ByteTokenizer(), out, **(defaults | options))


def documents(out: Path, split: Any = "train") -> list[str]:
    tokens = TokenFile(out, split)
    ids = tokens.window(0, len(tokens)).tolist()
    texts = bytes(i if i < 256 else 0 for i in ids).decode().split("\0")
    assert texts.pop() == "", "the last document has an end too"
    return texts


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with documents of every kind, two hundred in all."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    for i in range(50):
        (folder / "deep" / f"{i:02}.py").write_text(f"x = {i}\r\n")
    write_lines(folder / "a.jsonl", [{"text": f"line {i}"} for i in range(50)])
    write_lines(folder / "b.jsonl.gz", [{"text": f"zipped {i} é"} for i in range(50)])
    write_parquet(folder / "c.parquet", text=[f"row {i}" for i in range(50)], other=list(range(50)))
    return folder


def test_files_of_every_kind_are_tokenized(tmp_path: Path, mixed: Path) -> None:
    info = run([mixed], tmp_path / "out")
    expected = [f"line {i}" for i in range(50)] + [f"zipped {i} é" for i in range(50)]
    expected += [f"row {i}" for i in range(50)] + [f"x = {i}\r\n" for i in range(50)]
    assert documents(tmp_path / "out") == expected
    assert info.train.documents == 200
    assert info.train.bytes == sum(len(text.encode()) for text in expected) == info.train.tokens - 200
    assert info.sources == (str(mixed),)


def test_the_number_of_workers_and_of_blocks_makes_no_difference(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run([mixed], tmp_path / "alone", val_fraction=0.2)
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 100)
    together = run([mixed], tmp_path / "together", val_fraction=0.2, workers=3)
    assert alone == together
    for name in ("train.bin", "val.bin", "meta.json", "tokenizer.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_the_split_is_by_document(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts + texts])
    info = run([path], tmp_path / "out", val_fraction=0.2)
    train, val = documents(tmp_path / "out"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts + texts)
    assert not set(train) & set(val)
    assert 0.15 < info.val.documents / 2000 < 0.25


def test_an_untrained_tokenizer_learns_from_the_training_split(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"abcabcabc {i}"} for i in range(100)])
    info = tokenize([path], BPETokenizer(260), tmp_path / "out", workers=1, progress=False)
    tokenizer = info.open_tokenizer(tmp_path / "out")
    assert info.vocab_size == tokenizer.vocab_size == 260
    assert tokenizer.decode(TokenFile(tmp_path / "out").window(0, 3).tolist()).startswith("abc")


def test_another_field_and_empty_documents(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"body": "one"}, {"body": ""}, {"body": "two"}])
    lines.write_text(lines.read_text() + "\n  \n")
    (tmp_path / "empty.txt").touch()
    info = run([lines, tmp_path / "empty.txt"], tmp_path / "out", text_field="body")
    assert documents(tmp_path / "out") == ["one", "two"]
    assert info.train.documents == 2


@pytest.mark.parametrize(
    ("name", "array"),
    [("a.jsonl.zst", False), ("a.JSONL", False), ("a.json", False), ("a.json", True), ("a.Json.Zst", True)],
)
def test_json_of_all_kinds(name: str, array: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": f"fern {i}"} for i in range(1500)]
    text = json.dumps(records) if array else "".join(json.dumps(record) + "\n" for record in records)
    path = compressed(tmp_path / name, text.encode())
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 1000)
    blocks = list(readers.read_blocks(path, "text"))
    assert len(blocks) > 1 and sum(block.size for block in blocks) == path.stat().st_size
    assert run([path], tmp_path / "out").train.documents == 1500
    assert documents(tmp_path / "out") == [record["text"] for record in records]


def problems(paths: list[Path], out: Path, **options: Any) -> list[str]:
    """The lines of the error that these inputs make, after which nothing is left."""
    with pytest.raises(ConfigError) as caught:
        run(paths, out, **options)
    assert not out.exists() and not list(out.parent.glob(".*.tmp"))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_named(tmp_path: Path, workers: int) -> None:
    good = '{"text": "fine"}\n'
    bad = ["{", "[1]", '{"txt": "a"}', '{"id": 1}', '{"text": 5}', '{"text": null}', '{"text": "\\ud800"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(good + line + "\n" for line in bad).encode() + b'{"text": "\xff"}')
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"ab\xff")
    assert problems([path, binary], tmp_path / "out", workers=workers) == [
        f"{path}:2: not a JSON object on one line: Expecting property name enclosed in double quotes at column 2",
        f"{path}:4: not a JSON object but list",
        f"{path}:6: no field 'text'; did you mean 'txt'?",
        f"{path}:8: no field 'text'; fields: id",
        f"{path}:10: the text is not a string but int",
        f"{path}:12: the text is not a string but NoneType",
        f"{path}:14: not Unicode: half a surrogate pair at 0",
        f"{path}:15: not UTF-8: byte 0xff at 10",
        f"{binary}: not UTF-8: byte 0xff at 2",
    ]


def test_only_the_first_problems_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 10)
    path = write_lines(tmp_path / "a.jsonl", [5] * 50)
    lines = problems([path], tmp_path / "out")
    assert len(lines) == 21
    assert lines[-1] == "and 30 more"


def test_bad_input_is_found_while_training_too(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}, 5])
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not a JSON object but int"):
        tokenize([path], BPETokenizer(257), tmp_path / "out", progress=False)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    zipped = write_lines(tmp_path / "a.jsonl.gz", [{"text": str(i) * 100} for i in range(100)])
    os.truncate(zipped, zipped.stat().st_size - 20)
    table = tmp_path / "b.parquet"
    table.write_bytes(b"no parquet")
    other = write_parquet(tmp_path / "c.parquet", texts=["a"])
    empty_rows = write_parquet(tmp_path / "d.parquet", text=["a", None])
    archive = compressed(tmp_path / "e.jsonl.zst", b'{"text": "a"}\n' * 100)
    os.truncate(archive, archive.stat().st_size - 9)
    array = tmp_path / "f.json"
    array.write_text('[{"text": "a"},\n{"text": 5}, {"txt": "a"},\n{"text": }]')
    lines = problems([zipped, table, other, empty_rows, archive, array], tmp_path / "out")
    assert len(lines) == 6
    assert lines[4].startswith(f"{archive}: cannot be read: Truncated compressed stream")
    assert lines[5].startswith(f"{array}: cannot be read: not a JSON array: line 3, column 10")
    array.write_text('[{"text": "a"},\n{"text": 5}, {"txt": "a"}]')
    assert problems([array], tmp_path / "out") == [
        f"{array}:2: the text is not a string but int", f"{array}:2: no field 'text'; did you mean 'txt'?"
    ]  # fmt: skip
    assert lines[0].startswith(f"{zipped}: cannot be read: Compressed file ended")
    assert lines[1].startswith(f"{table}: cannot be read: ")
    assert lines[2] == f"{other}: no field 'text'; did you mean 'texts'?"
    assert lines[3] == f"{empty_rows}:2: the text is not a string but NoneType"


def test_paths_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "image.png").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.png").touch()
    (tmp_path / "a.txt").write_text("a")
    given = [tmp_path / "none", tmp_path / "image.png", tmp_path / "folder", tmp_path / "a.txt", tmp_path / "a.txt"]
    lines = problems(given, tmp_path / "out")
    assert [line.split(";")[0] for line in lines] == [
        f"paths: there is no file or folder {tmp_path / 'none'}",
        f"paths: {tmp_path / 'image.png'} is of an unknown kind",
        f"paths: {tmp_path / 'folder'} has no file that can be read",
        f"paths: {tmp_path / 'a.txt'} is given twice",
    ]
    assert problems([], tmp_path / "out") == ["paths: is empty; give files or folders"]


def test_nothing_but_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert problems([tmp_path / "a.txt"], tmp_path / "out") == ["paths: all documents are empty"]


def test_what_a_folder_holds_besides_is_said_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.png", "c.png", "LICENSE", ".git/config.txt"):
        (folder / name).write_text(name)
    with pytest.warns(UserWarning, match=r"skipped 3 files of other kinds: 2 \.png, 1 LICENSE"):
        run([folder], tmp_path / "out")
    assert documents(tmp_path / "out") == ["a.txt"]


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert problems([tmp_path / "a.txt"], tmp_path / "out", val_fraction=1)[0].startswith("val_fraction=1: must be")
    assert problems([tmp_path / "a.txt"], tmp_path / "out", workers=0)[0].startswith("workers=0: must be")


def test_an_existing_dataset_is_replaced_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    run([tmp_path / "a.txt"], tmp_path / "out")
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        run([tmp_path / "a.txt"], tmp_path / "out")
    assert documents(tmp_path / "out") == ["a"]
    run([tmp_path / "a.txt"], tmp_path / "out", overwrite=True)
    assert documents(tmp_path / "out") == ["b"]


def test_progress_in_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a" * 3_000_000)
    run([tmp_path / "a.txt"], tmp_path / "out", progress=True)
    assert "tokenizing: 3.0 of 3.0 MB" in capsys.readouterr().err


def test_names_of_tokenizers(tmp_path: Path) -> None:
    assert isinstance(parse_tokenizer("bytes"), ByteTokenizer)
    trained = parse_tokenizer("bpe:4096")
    assert isinstance(trained, BPETokenizer) and trained.vocab_size == 4096
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    assert isinstance(parse_tokenizer(str(tmp_path)), TokenizerFile)
    named = parse_tokenizer(str(tmp_path), "Z")
    assert isinstance(named, TokenizerFile) and named.eos_token == "Z"
    for text in ("bytes", "bpe:300"):
        with pytest.raises(ConfigError, match="eos='Z': is only for a tokenizer"):
            parse_tokenizer(text, "Z")
    for text in ("bpe", "bpe:", "bpe:x", "bpe:-5", "byte"):
        with pytest.raises(ConfigError, match=f"tokenizer='{text}': .*bpe:SIZE"):
            parse_tokenizer(text)


SLOW_RUN = """
import sys, time
from fiddlehead.data.tokenize import tokenize
from fiddlehead.data.tokenizers import ByteTokenizer

class SlowTokenizer(ByteTokenizer):
    def encode_batch(self, texts):
        time.sleep(0.1)
        return super().encode_batch(texts)

if __name__ == "__main__":
    tokenize([sys.argv[1]], SlowTokenizer(), sys.argv[2], workers=2, progress=False)
"""


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped(tmp_path: Path, kill: signal.Signals) -> None:
    script, folder = tmp_path / "run.py", tmp_path / "folder"
    script.write_text(SLOW_RUN)
    folder.mkdir()
    for i in range(1000):  # a minute's work
        (folder / f"{i}.txt").write_text(str(i))
    process = subprocess.Popen(
        [sys.executable, script, folder, tmp_path / "out"], stderr=subprocess.PIPE, start_new_session=True
    )
    with process:
        while len(workers := children(process.pid)) < 3:  # two, and the one that tracks their resources
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        if kill == signal.SIGINT:
            os.killpg(process.pid, kill)  # as Ctrl-C does: to all of them
        else:
            process.kill()
        _, errors = process.communicate(timeout=20)
    left = list(tmp_path.glob(".out.*.tmp"))
    assert not (tmp_path / "out").exists()
    if kill == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors and b"Process Spawn" not in errors
        assert not left
    else:
        assert len(left) == 1
        (tmp_path / "a.txt").write_text("a")
        run([tmp_path / "a.txt"], tmp_path / "out")
        assert not left[0].exists()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_tokenizing_needs_no_torch() -> None:
    code = (
        "import sys, fiddlehead.data.tokenize, fiddlehead.data.corpus; print({'torch', 'lightning'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_documents_that_all_fall_into_the_validation_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world this is text\n")  # whose hash is below a half
    with pytest.raises(ConfigError, match=r"val_fraction=0\.5: by their hashes, all 1 documents"):
        tokenize([tmp_path / "a.txt"], ByteTokenizer(), tmp_path / "out", val_fraction=0.5, workers=1, progress=False)
    assert not (tmp_path / "out").exists()
