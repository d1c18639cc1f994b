"""What `data.paths` and `data.split` may name, and what a run then trains and validates on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiddlehead.data import ByteTokenizer, PreTrainingDataModule
from fiddlehead.data.sources import read_sources
from fiddlehead.data.token_writer import TokenDatasetWriter
from fiddlehead.data.tokenize import tokenize
from fiddlehead.errors import ConfigError
from tests.data.test_megatron import write

SIZES: dict[str, Any] = {"seq_length": 4, "micro_batch_size": 2, "global_batch_size": 10, "val_samples": 8}


def megatron(prefix: Path, marker: int, documents: int = 100, length: int = 5, dtype: str = "int32") -> Path:
    """A dataset of equal documents, whose ids are `marker` and the document's number."""
    return write(prefix, dtype, [[[marker, *[number] * (length - 1)]] for number in range(documents)])


def module(paths: Any, **changes: Any) -> PreTrainingDataModule:
    data = PreTrainingDataModule(paths, **{**SIZES, "tokenizer": ByteTokenizer(), **changes})
    data.prepare_data()
    assert data.too_short() == []
    data.setup()
    return data


def trained(data: PreTrainingDataModule, steps: int) -> Counter[int]:
    """How many windows were taken from each dataset, by its number."""
    borders = np.cumsum(data._windows(data._train).sizes)
    indices = [i for step in range(steps) for i in data.batch_indices(step)]
    return Counter(np.searchsorted(borders, indices, side="right").tolist())


@pytest.mark.parametrize(
    ("split", "number", "train", "val"),
    [
        ("949,50,1", 7, (0, 7), (7, 7)),
        ("949,50,1", 1001, (0, 950), (950, 1000)),
        ("900,50,50", 10, (0, 9), (9, 10)),
        (None, 1001, (0, 901), (901, 951)),
        ("99,1", 1001, (0, 991), (991, 1001)),
        ("1,1,1", 7, (0, 2), (2, 5)),
        ("100", 10, (0, 10), (10, 10)),
        ("98,0,2", 1001, (0, 981), (981, 981)),
        ("0.9, 0.1, 0", 10, (0, 9), (9, 10)),
    ],
)
def test_the_parts_are_those_of_megatron(
    split: str | None, number: int, train: tuple[int, int], val: tuple[int, int], tmp_path: Path
) -> None:
    """The numbers are those of Megatron-core 0.16.1."""
    megatron(tmp_path / "text", 1, documents=number)
    sources = read_sources(tmp_path / "text", split)
    assert sources["train"][0].documents(tmp_path / "text") == train
    assert sources["val"][0].documents(tmp_path / "text") == val


@pytest.mark.parametrize("name", ["text", "text.bin", "text.idx"])
def test_a_megatron_dataset_trains_and_validates_on_its_own_parts(name: str, tmp_path: Path) -> None:
    megatron(tmp_path / "text", 200)
    data = module(tmp_path / name, split="80,20", separate_documents=True)
    assert data.vocab_size == 257
    train, val = (opened.__getitems__(list(range(len(opened)))) for opened in (data._train, data._val))  # type: ignore
    assert len(data._train) == 99 and set(train["input_ids"].unique().tolist()) == {*range(79), 200}  # type: ignore
    assert set(val["input_ids"].unique().tolist()) == {*range(80, 99), 200}
    follows = train["labels"][train["labels"] == 200]
    assert not follows.numel()  # a new document is never predicted
    assert train["cu_seqlens"].diff().max() == 4


def test_a_weighted_list_is_a_blend(tmp_path: Path) -> None:
    a, b = megatron(tmp_path / "a", 1), megatron(tmp_path / "b", 2, documents=40)
    data = module(["30", str(a), "70", str(b)], split="100,0,0", val_samples=0)
    found = trained(data, 100)
    assert found[0] == pytest.approx(300, abs=3) and found[1] == pytest.approx(700, abs=3)
    assert data.batch_indices(7) == module([0.3, a, 0.7, b], split="100", val_samples=0).batch_indices(7)
    assert data.batch_indices(7) != module([0.5, a, 0.5, b], split="100", val_samples=0).batch_indices(7)


def test_a_list_without_weights_is_one_after_another(tmp_path: Path) -> None:
    paths = [megatron(tmp_path / "a", 1), megatron(tmp_path / "b", 2, documents=40)]
    data = module(paths, split="100", val_samples=0)
    windows = len(data._train)  # type: ignore[arg-type]
    assert windows == (100 * 5 - 1) // 4 + (40 * 5 - 1) // 4
    indices = [i for step in range(windows // 10 + 1) for i in data.batch_indices(step)]
    assert sorted(indices[:windows]) == list(range(windows))


def test_a_mapping_names_the_files_of_each_part(tmp_path: Path) -> None:
    a, b, c = (megatron(tmp_path / name, number) for number, name in enumerate("abc", start=201))
    data = module({"train": [str(a)], "validation": ["1", str(b), "3", str(c)], "test": [str(a)]})
    assert data._train.__getitems__([0])["input_ids"][0, 0] == 201  # type: ignore[union-attr]
    chosen = data._validation(1)
    marks = data._val.__getitems__(chosen.tolist())["input_ids"]  # type: ignore[union-attr]
    assert [(marks == mark).any(dim=1).sum() for mark in (202, 203)] == [2, 6]
    assert len(data._validation(3)) == 6


def test_our_own_folders_are_blended_with_megatron_s_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefghij" * 20)
    options: dict[str, Any] = {"workers": 1, "progress": False, "val_fraction": 0}
    tokenize([tmp_path / "t.txt"], ByteTokenizer(), tmp_path / "own", **options)
    data = module([1, tmp_path / "own", 3, megatron(tmp_path / "theirs", 2)], tokenizer=None, split=None, val_samples=2)
    assert data.vocab_size == 257 and trained(data, 40)[1] == pytest.approx(300, abs=3)


def test_the_working_directory_may_be_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("abcdefghij" * 20)
    tokenize([tmp_path / "t.txt"], ByteTokenizer(), tmp_path / "own", workers=1, progress=False, val_fraction=0)
    monkeypatch.chdir(tmp_path / "own")
    assert trained(module(".", tokenizer=None, split=None, val_samples=0), 4)
    for path in ("", "/"):
        with pytest.raises(ConfigError, match=r"is not a token dataset: it has no meta\.json"):
            monkeypatch.chdir(tmp_path)
            _ = module(path, tokenizer=None, split=None).vocab_size


def test_the_tokenizer_beside_the_files_is_theirs(tmp_path: Path) -> None:
    prefix = megatron(tmp_path / "text", 1)
    with pytest.raises(ConfigError, match="tokenizer=None: Megatron's files come without one; give TokenizerFile"):
        _ = PreTrainingDataModule(prefix, **SIZES).vocab_size
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    data = module(prefix, tokenizer=None)
    assert data.vocab_size == 257 and data.tokenizer.decode([104, 105]) == "hi"


def test_the_checksums_are_those_of_both_files(tmp_path: Path) -> None:
    data = module([megatron(tmp_path / "a", 1), megatron(tmp_path / "b", 300)][0])
    found = data.checksums()
    assert [name for name, _ in found["train"]] == ["a.bin", "a.idx"]
    assert found["train"] == found["val"]
    with pytest.raises(ConfigError, match="has the token id 300, and the tokenizer has 257 tokens"):
        module(tmp_path / "b").checksums()
    write(tmp_path / "c", "int16", [[[1, -5, 3]] * 200])
    with pytest.raises(ConfigError, match="has the token id -5"):
        PreTrainingDataModule(tmp_path / "c", tokenizer=ByteTokenizer(), split="1", val_samples=0).checksums()


def test_a_token_without_a_row_in_the_model_is_found(tmp_path: Path) -> None:
    data = PreTrainingDataModule(megatron(tmp_path / "text", 250), tokenizer=ByteTokenizer(), **SIZES)
    assert data.missing_rows(251) == []
    (problem,) = {each.split(": at")[0] for each in data.missing_rows(250)}
    assert problem == f"{tmp_path}/text.bin"


@pytest.mark.parametrize(
    ("paths", "split", "said"),
    [
        ([], None, "paths: is empty"),
        (["30", "a", "b", "c"], None, "'b' must be a weight above 0, before its path"),
        (["30", "a", "0", "b"], None, "'0' must be a weight above 0"),
        (["30", "a", "-1", "b"], None, "'-1' must be a weight above 0"),
        (["30", "a", "nan", "b"], None, "'nan' must be a weight above 0"),
        ([30, "a", 70], None, "30 is a weight without a path behind it"),
        ([30, 40], None, "40 stands where a path must be"),
        ({"validation": "a"}, None, "paths: has no 'train'"),
        ({"train": "a", "valid": "b"}, None, "unknown part 'valid'; did you mean 'val"),
        ({"train": "a", "validation": []}, None, "paths: is empty"),
        ({"train": "a"}, "9,1", "split='9,1': paths names the files of each part already"),
        ("a", "949;50", "split='949;50': must be up to three numbers"),
        ("a", "1,2,3,4", "must be up to three numbers"),
        ("a", "1,-2", "must be up to three numbers"),
        ("a", "0,0,0", "must be up to three numbers"),
        (None, "9,1", "split='9,1': there are no paths to split"),
    ],
)
def test_what_has_no_meaning_is_refused(paths: Any, split: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PreTrainingDataModule(paths, split=split)


def test_what_the_paths_lead_to_is_checked(tmp_path: Path) -> None:
    tokenizer: Any = {"tokenizer": ByteTokenizer()}
    with TokenDatasetWriter(tmp_path / "own", ByteTokenizer(), []) as writer:
        writer.add("train", np.zeros(100, dtype=np.uint16), 1, 99)
        writer.finish()
    with pytest.raises(ConfigError, match=r"has split .*own already; split is for Megatron's files"):
        PreTrainingDataModule(tmp_path / "own", split="9,1")
    (tmp_path / "folder").mkdir()
    megatron(tmp_path / "folder/text_document", 1)
    with pytest.raises(ConfigError, match=r"is a folder of Megatron's files; .*allowed: .*folder/text_document"):
        PreTrainingDataModule(tmp_path / "folder", **SIZES, **tokenizer).setup()
    with pytest.raises(ConfigError, match=r"there is no such folder, and no text_documnt\.bin .*mean .*text_document'"):
        PreTrainingDataModule(tmp_path / "folder/text_documnt", **SIZES, **tokenizer).setup()
    small = megatron(tmp_path / "small", 1, documents=1, length=3)
    with pytest.raises(ConfigError, match=r"needs 5 tokens, and the training split of .*small has 3"):
        PreTrainingDataModule(
            [1, megatron(tmp_path / "large", 1), 1, small], split="1", **(SIZES | tokenizer | {"val_samples": 0})
        ).setup()
