"""Examples for fine-tuning: read, checked, tokenized, and packed into rows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fiddlehead.data import ByteTokenizer, FineTuningDataModule, TokenizerFile
from fiddlehead.data.documents import NO_LABEL
from fiddlehead.errors import ConfigError
from tests.data.small_tokenizers import KINDS, save_gemma
from tests.data.test_chat_template import CHATML
from tests.data.test_records import CHAT, COMPLETION, lines


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    ByteTokenizer().save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def module(path: Path, tokenizer: Path, **options: Any) -> FineTuningDataModule:
    made = FineTuningDataModule(path, tokenizer=tokenizer, **({"seq_length": 64, "val_samples": 0} | options))
    made.setup()
    return made


def texts(batch: dict[str, Any]) -> list[tuple[str, str]]:
    """What each document of a batch says, and what of it is to be predicted."""
    decode = ByteTokenizer().decode
    ids, labels, ends = batch["input_ids"].flatten(), batch["labels"].flatten(), batch["cu_seqlens"].tolist()
    found = []
    for start, end in pairwise(ends):
        learned = labels[start:end]
        if (learned != NO_LABEL).any():
            found.append((decode(ids[start:end].tolist()), decode(learned[learned != NO_LABEL].tolist())))
    return found


def test_only_answers_are_to_be_predicted(tmp_path: Path, tokenizer: Path) -> None:
    chat, completion = (
        module(lines(tmp_path / "a.jsonl", example), tokenizer)._train.__getitems__([0])  # pyright: ignore
        for example in (CHAT, COMPLETION)
    )
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>"
    assert texts(chat) == [(asked, "ho<|im_end|>\n")]
    assert texts(completion) == [("2+2=4", "4")]
    assert completion["labels"][completion["labels"] != NO_LABEL].tolist() == [ord("4"), ByteTokenizer.eos_id]


def test_answers_that_a_template_writes_otherwise_later_are_rows_of_their_own(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [*CHAT["messages"], *CHAT["messages"]]})
    learned = {}
    for kind in ("qwen", "llama3"):
        data = module(path, KINDS[kind](tmp_path / kind), packed=False, seq_length=128)
        rows: Any = data._train
        batch = rows.__getitems__(list(range(len(rows))))
        learned[kind] = data.tokenizer.decode(batch["labels"][batch["labels"] != NO_LABEL].tolist())
        assert len(rows) == (2 if kind == "qwen" else 1)
    assert learned["llama3"] == "hoho" and learned["qwen"] == "<think>\n\n</think>\n\nho\n" * 2


def test_messages_without_a_template_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tokenizer / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: messages need a chat template"):
        module(lines(tmp_path / "a.jsonl", CHAT), tokenizer)
    late = FineTuningDataModule(lines(tmp_path / "b.jsonl", *[CHAT] * 9), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"b\.jsonl:\d: messages need a chat template") as error:
        _ = late.vocab_size  # which a plan asks for, before the run starts
    assert len(error.value.problems) == 1
    assert module(lines(tmp_path / "c.jsonl", COMPLETION), tokenizer).vocab_size == 257


def test_a_long_example_is_cut_and_dropped_if_no_answer_is_left(tmp_path: Path, tokenizer: Path, capsys) -> None:
    long, deaf = {"prompt": "a", "completion": "b" * 99}, {"prompt": "a" * 99, "completion": "b"}
    data = module(lines(tmp_path / "a.jsonl", COMPLETION, long, deaf), tokenizer)
    assert "2 in 2 rows" in capsys.readouterr().out and len(data._train or ()) == 2
    with pytest.raises(ConfigError, match="is too short for any answer"):
        module(lines(tmp_path / "b.jsonl", deaf), tokenizer)


def test_validation_is_taken_from_the_examples_or_given(tmp_path: Path, tokenizer: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *[{"prompt": str(i), "completion": "x"} for i in range(40)])
    data = module(path, tokenizer, val_samples=9, packed=False)
    assert (len(data._train or ()), len(data._val or ())) == (38, 2)
    data = module(path, tokenizer, val_samples=9, val_paths=lines(tmp_path / "v.jsonl", COMPLETION))
    assert len(data._val or ()) == 1


def test_an_epoch_has_each_example_once_and_rows_of_several_are_not_counted(tmp_path: Path, tokenizer: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *[COMPLETION] * 10)
    made = FineTuningDataModule(path, tokenizer=tokenizer, seq_length=64, val_fraction=0.2, val_samples=2, packed=False)
    assert (made.num_samples("train"), made.num_samples("val")) == (8, 2)
    made = FineTuningDataModule(path, tokenizer=tokenizer, seq_length=64, val_samples=2, packed=True)
    assert made.num_samples("train") is None
    assert FineTuningDataModule(tmp_path / "none.jsonl").num_samples("train") is None


def test_pairs_of_answers_share_a_row(tmp_path: Path, tokenizer: Path) -> None:
    records = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no!" * i} for i in range(1, 5)]
    data = module(lines(tmp_path / "a.jsonl", *records), tokenizer, preference=True)
    batch = data._train.__getitems__(list(range(len(data._train))))  # pyright: ignore
    ends = batch["cu_seqlens"]
    for better, worse in batch["pairs"].tolist():
        said = [texts(batch | {"cu_seqlens": ends[document : document + 2]})[0] for document in (better, worse)]
        assert said[0][1] == "yes" and said[1][1].startswith("no!") and said[0][0][0] == said[1][0][0]
    assert len(batch["pairs"]) == 4


def test_each_answer_of_a_pair_has_half_a_row(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    pair = {"prompt": "?", "chosen": "a" * 99, "rejected": "b" * 3}
    data = module(lines(tmp_path / "a.jsonl", pair), tokenizer, preference=True, seq_length=20)
    assert "1 were cut at 10 tokens" in capsys.readouterr().out
    batch = data._train.__getitems__([0])  # pyright: ignore[reportOptionalMemberAccess]
    assert [learned for _, learned in texts(batch)] == ["a" * 10, "bbb"]


def test_the_texts_are_let_go_once_they_are_tokens(tmp_path: Path, tokenizer: Path) -> None:
    path = lines(tmp_path / "a.jsonl", CHAT)
    data = module(path, tokenizer)
    path.unlink()
    data.setup()
    assert data.vocab_size == 257 and data._records is None


def test_a_token_of_an_example_without_a_row_in_the_model_is_named(tmp_path: Path) -> None:
    """Gemma's tokenizer has a token more than its text models have rows."""
    folder = save_gemma(tmp_path / "gemma")
    tokenizer = TokenizerFile(folder)
    image = tokenizer.vocab_size - 1
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "def f"}]}
    seen = {"messages": [{"role": "user", "content": "<image_soft_token>"}, chat["messages"][1]]}

    def opened(vocab_size: int, *records: dict[str, Any]) -> FineTuningDataModule:
        path = lines(tmp_path / "a.jsonl", *records)
        data = FineTuningDataModule(path, tokenizer=folder, val_samples=0, seq_length=64, global_batch_size=1)
        data.model_vocab_size = vocab_size
        assert (data.missing_rows(vocab_size) == []) == (vocab_size > tokenizer.eos_id)
        data.setup()
        return data

    assert opened(image, chat, {"messages": chat["messages"] * 2}).tokenizer.eos_id == 1
    opened(image + 1, chat, seen)
    with pytest.raises(ConfigError) as error:
        opened(image, chat, seen, seen)
    token = f"the token '<image_soft_token>' ({image}), and the model has vocab_size={image}: ids from 0 to {image - 1}"
    assert error.value.problems == tuple(f"{tmp_path / 'a.jsonl'}:{number}: has {token}" for number in (2, 3))
    with pytest.raises(ConfigError, match=r"the end of an answer is the token '<eos>' \(1\)"):
        opened(1, chat)


def nemo_folder(folder: Path, **changes: Any) -> Path:
    """A folder as NeMo's `FineTuningDataModule` has it as `dataset_root`; `changes` replace the fields of examples."""
    folder.mkdir()
    for part, number in (("training", 6), ("validation", 2), ("test", 3)):
        fields = changes or {"input": "Question: {n}? Answer:", "output": "{n}"}
        rows = [{name: text.replace("{n}", f"{part[:2]}{n}") for name, text in fields.items()} for n in range(number)]
        lines(folder / f"{part}.jsonl", *rows)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_of_nemo_is_read_as_nemo_does(tmp_path: Path, tokenizer: Path, packed: bool) -> None:
    data = module(nemo_folder(tmp_path / "root"), tokenizer, val_samples=2, packed=packed)
    train, val = (rows.__getitems__(list(range(len(rows)))) for rows in (data._train, data._val))  # type: ignore
    assert sorted(texts(train)) == [(f"Question: tr{n}? Answer: tr{n}", f" tr{n}") for n in range(6)]
    assert sorted(texts(val)) == [(f"Question: va{n}? Answer: va{n}", f" va{n}") for n in range(2)]
    assert [name for name, _ in data.checksums()["paths"]] == ["training.jsonl"]
    assert [name for name, _ in data.checksums()["val_paths"]] == ["validation.jsonl"]


def test_a_folder_of_nemo_may_have_no_validation_or_another(tmp_path: Path, tokenizer: Path) -> None:
    root = nemo_folder(tmp_path / "root")
    other = nemo_folder(tmp_path / "other")
    replaced = module(root, tokenizer, val_samples=9, val_paths=other / "test.jsonl", packed=False)
    assert len(replaced._val) == 3  # type: ignore[arg-type]
    folder = module([root, other], tokenizer, val_samples=9, packed=False)
    assert (len(folder._train), len(folder._val)) == (12, 4)  # type: ignore[arg-type]
    (root / "validation.jsonl").unlink()
    drawn = module(root, tokenizer, val_samples=9, val_fraction=0.5, packed=False)
    assert (len(drawn._train), len(drawn._val)) == (3, 3)  # type: ignore[arg-type]
    (root / "training.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no training\.jsonl, so it is not a folder of NeMo"):
        module(root, tokenizer)


def test_a_template_makes_the_text_of_any_fields(tmp_path: Path, tokenizer: Path) -> None:
    root = nemo_folder(tmp_path / "root", question="{n}", answer="so {n}", input="x", output="y")
    for path in (root, root / "training.jsonl"):
        data = module(path, tokenizer, prompt_template="Q: {question}\nA: {answer}", seq_length=256)
        batch = data._train.__getitems__([0])  # type: ignore[union-attr]
        assert sorted(texts(batch)) == [(f"Q: tr{n}\nA: so tr{n}", f" so tr{n}") for n in range(6)]
    plain = module(root / "training.jsonl", tokenizer, seq_length=256)._train.__getitems__([0])  # type: ignore
    assert texts(plain) == [("xy", "y")] * 6  # without a template, a file's text is as it is


def test_a_conversation_in_a_folder_of_nemo_has_the_chat_template(tmp_path: Path, tokenizer: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    lines(root / "training.jsonl", CHAT)
    batch = module(root, tokenizer)._train.__getitems__([0])  # type: ignore[union-attr]
    assert texts(batch)[0][1] == "ho<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"input": "a"}, {"prompt_template": "{input} {output}"}, r"a\.jsonl:1: needs the fields input, output; and"),
        ({"input": "a", "output": 4}, {"prompt_template": "{input} {output}"}, "output: is a number; prompt_template"),
        ({"input": "a", "output": " "}, {"prompt_template": "{input} {output}"}, "output: is empty"),
        (COMPLETION, {"prompt_template": "{input"}, "prompt_template='{input': must end with the field"),
        (COMPLETION, {"prompt_template": "{a} {b}", "preference": True}, "pairs of answers have none"),
    ],
)
def test_what_does_not_fit_the_template_is_named(
    row: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path, tokenizer: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        module(lines(tmp_path / "a.jsonl", row), tokenizer, **options)
