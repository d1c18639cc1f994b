"""Examples of what to answer: read, checked, tokenized, and laid out in rows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.data import ByteTokenizer, FineTuningDataModule
from fiddlehead.data.documents import NO_LABEL
from fiddlehead.data.examples import Example, read_records
from fiddlehead.data.fine_tuning import Rows, pack
from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig
from tests.data.test_chat_template import CHATML

GOOD: list[dict[str, Any]] = [
    {"prompt": "2+2=", "completion": "4"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
]


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


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
    data = module(lines(tmp_path / "a.jsonl", *GOOD), tokenizer, seq_length=128)
    (batch,) = [data._train.__getitems__([0])]  # pyright: ignore[reportOptionalMemberAccess]
    assert sorted(texts(batch)) == [
        ("2+2=4", "4"),
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>", "ho<|im_end|>\n"),
    ]
    last = batch["labels"][batch["labels"] != NO_LABEL]
    assert ByteTokenizer.eos_id in last  # that of the completion


def test_files_of_all_kinds_give_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([GOOD[0]] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    saved = tmp_path / "saved"
    saved.mkdir()
    with pyarrow.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table.schema) as file:
        file.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    jsonl = lines(tmp_path / "a.jsonl", *[GOOD[0]] * 3)
    for path in (jsonl, tmp_path / "a.parquet", saved):
        assert [record.values for record in read_records([path], preference=False)] == [GOOD[0]] * 3


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "is no JSON: column "),
        ("[1]", "is a list, not an object with fields"),
        ({"promt": "a", "completion": "b"}, "has promt, completion: unknown field 'promt'; did you mean 'prompt'?"),
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"prompt": "a", "completion": 3}, "completion: is a int"),
        ({"messages": "hi"}, "messages: is text; allowed: a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "none is the assistant's"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content: is a NoneType"),
        ({"messages": ["hi"]}, "messages[0]: is no message with a role and a content"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "needs the fields messages or prompt, completion"),
    ],
)
def test_a_bad_line_is_named(record: Any, said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD[0], record, GOOD[0])
    with pytest.raises(ConfigError) as error:
        read_records([path], preference=False)
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value)


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    paths = [lines(tmp_path / f"{name}.jsonl", *["{"] * 15) for name in "ab"]
    with pytest.raises(ConfigError) as error:
        read_records([*paths, tmp_path / "none.jsonl"], preference=False)
    said = str(error.value)
    assert f"{paths[0]}:1: " in said and f"{paths[1]}:5: " in said and said.endswith("and 11 more")


def test_messages_without_a_template_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tokenizer / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: messages need a chat template"):
        module(lines(tmp_path / "a.jsonl", GOOD[1]), tokenizer)


def test_what_is_too_long_is_cut_and_what_has_no_answer_left_dropped(tmp_path: Path, tokenizer: Path, capsys) -> None:
    long, deaf = {"prompt": "a", "completion": "b" * 99}, {"prompt": "a" * 99, "completion": "b"}
    data = module(lines(tmp_path / "a.jsonl", GOOD[0], long, deaf), tokenizer)
    assert "2 in 2 rows" in capsys.readouterr().out and len(data._train or ()) == 2
    with pytest.raises(ConfigError, match="leaves no answer of any example"):
        module(lines(tmp_path / "b.jsonl", deaf), tokenizer)


def test_validation_is_taken_from_the_examples_or_given(tmp_path: Path, tokenizer: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *[{"prompt": str(i), "completion": "x"} for i in range(40)])
    data = module(path, tokenizer, val_samples=9, packed=False)
    assert (len(data._train or ()), len(data._val or ())) == (38, 2)
    data = module(path, tokenizer, val_samples=9, val_paths=lines(tmp_path / "v.jsonl", GOOD[0]))
    assert len(data._val or ()) == 1


def test_pairs_of_answers_share_a_row(tmp_path: Path, tokenizer: Path) -> None:
    records = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no!" * i} for i in range(1, 5)]
    data = module(lines(tmp_path / "a.jsonl", *records), tokenizer, preference=True)
    batch = data._train.__getitems__(list(range(len(data._train))))  # pyright: ignore
    ends = batch["cu_seqlens"]
    for better, worse in batch["pairs"].tolist():
        said = [texts(batch | {"cu_seqlens": ends[document : document + 2]})[0] for document in (better, worse)]
        assert said[0][1] == "yes" and said[1][1].startswith("no!") and said[0][0][0] == said[1][0][0]
    assert len(batch["pairs"]) == 4


@given(st.lists(st.integers(1, 20), max_size=40))
def test_packing_keeps_every_example_whole_and_no_row_too_long(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    used = [sum(lengths[number] for number in row) for row in rows]
    assert all(length <= 20 for length in used)
    assert sum(length <= 10 for length in used) <= 1  # or two rows would be one


@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
def test_packed_is_the_same_as_each_alone(position: Any) -> None:
    generator = np.random.default_rng(0)
    examples = []
    for length in generator.integers(4, 24, 12):
        ids = generator.integers(0, 50, length)
        examples.append((Example(ids.astype(np.int64), np.arange(length) >= length // 2),))
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=50, seq_length=32,
        position_embedding_type=position, init_method_std=0.3,
    )  # fmt: skip
    model = Transformer(config)

    def loss_and_gradients(packed: bool) -> list[torch.Tensor]:
        rows = Rows(examples, 32, 0, packed=packed)
        batch = rows.__getitems__(range(len(rows)))
        logits = model(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"]).flatten(0, 1)
        loss = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum", ignore_index=NO_LABEL)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    packed, alone = loss_and_gradients(True), loss_and_gradients(False)
    for one, other in zip(packed, alone, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    total = torch.zeros(())
    for ((text,),) in zip(examples, strict=True):  # and as the model has it without any packing
        logits = model(torch.from_numpy(text.ids[None, :-1]))[0]
        labels = torch.from_numpy(np.where(text.learned[1:], text.ids[1:], NO_LABEL))
        total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL).detach()
    assert torch.allclose(total, packed[0], rtol=1e-5)
