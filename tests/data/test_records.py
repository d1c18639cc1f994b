"""Examples in files: read, checked, and brought into one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fiddlehead.data.records import read_records
from fiddlehead.errors import ConfigError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
COMPLETION: dict[str, Any] = {"prompt": "2+2=", "completion": "4"}
CHAT: dict[str, Any] = {"messages": [USER, ANSWER]}
PAIR: dict[str, Any] = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}


def lines(path: Path, *records: Any) -> Path:
    texts = (record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def saved(folder: Path, table: pyarrow.Table) -> Path:
    """A folder as `datasets.save_to_disk` writes it."""
    folder.mkdir()
    name = "data-00000-of-00001.arrow"
    with pyarrow.ipc.new_stream(str(folder / name), table.schema) as file:
        file.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    return folder


@pytest.mark.parametrize("example", [COMPLETION, CHAT])
def test_files_of_all_kinds_give_the_same(example: dict[str, Any], tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([example] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    first = b"\xef\xbb\xbf" + json.dumps(example).encode()  # a byte order mark, as some editors write
    jsonl = lines(tmp_path / "a.jsonl", first, b"", example, example)
    for path in (jsonl, tmp_path / "a.parquet", saved(tmp_path / "saved", table)):
        records = read_records([path], preference=False)
        assert [record.values for record in records] == [example] * 3
        assert records[2].where.endswith(":4" if path == jsonl else ":3")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"{", "is not valid JSON: column "),
        (b"[" * 100_000, "nested too deep"),
        (b'{"prompt": "a", "completion": "\xff"}', "is not valid UTF-8: byte 0xff at 31"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "is not valid Unicode: has half a surrogate pair"),
        ([1], "is a list, not an object with fields"),
        ("prompt", "is text, not an object with fields"),
        ({"promt": "a", "completion": "b"}, "has promt, completion: unknown field 'promt'; did you mean 'prompt'?"),
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"prompt": "a", "completion": 3}, "completion: is a number"),
        ({"prompt": [USER], "completion": [USER]}, "completion: has no message of the assistant"),
        ({"messages": "hi"}, "messages: is text; allowed: a list of messages"),
        (CHAT, "has messages, and the examples before prompt, completion; allowed: one shape for all"),
        ({"messages": [USER]}, "has no message of the assistant"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content: is null"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0].content: is empty"),
        ({"messages": ["hi"]}, "messages[0]: is not a message with a role and a content"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "needs the fields messages; or conversations; or prompt, completion; or instruction, output; or",
        ),
    ],
)
def test_a_bad_line_is_named(record: Any, said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", COMPLETION, record, COMPLETION)
    with pytest.raises(ConfigError) as error:
        read_records([path], preference=False)
    assert all(problem.startswith(f"{path}:2: ") for problem in error.value.problems) and said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chosen": [USER]}, "chosen: has no message of the assistant"),
        ({"rejected": []}, "rejected: has no message of the assistant"),
        ({"rejected": "b"}, "either all are text or all are lists of messages"),
        ({"rejected": None}, "needs the fields prompt, chosen, rejected; or chosen, rejected; and has prompt, chosen"),
    ],
)
def test_a_bad_pair_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", PAIR, PAIR | changes)
    with pytest.raises(ConfigError) as error:
        read_records([path], preference=True)
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("record", "others", "preference"),
    [
        (COMPLETION, {"chosen": "b", "id": 3}, False),
        (CHAT, {"prompt": "hi", "prompt_id": "x"}, False),
        (PAIR, {"messages": [USER, ANSWER]}, True),
    ],
)
def test_other_columns_say_nothing(record: dict[str, Any], others: Any, preference: bool, tmp_path: Path) -> None:
    plain, more = (lines(tmp_path / f"{n}.jsonl", r) for n, r in (("a", record), ("b", others | record)))
    found = [read_records([path], preference=preference)[0].values for path in (plain, more)]
    assert found[0] == found[1] == record


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    paths = [lines(tmp_path / f"{name}.jsonl", *[b"{"] * 15) for name in "ab"]
    with pytest.raises(ConfigError) as error:
        read_records([*paths, tmp_path / "none.jsonl"], preference=False)
    said = str(error.value)
    assert f"{paths[0]}:1: " in said and f"{paths[1]}:5: " in said and said.endswith("and 11 more")
    assert len(error.value.problems) == 21


def test_files_and_folders_that_hold_no_examples_are_named(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([COMPLETION])
    broken, several = saved(tmp_path / "broken", table), tmp_path / "several"
    (broken / "state.json").write_text("{}")
    several.mkdir()
    (several / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    half = saved(tmp_path / "half", table) / "data-00000-of-00001.arrow"
    half.write_bytes(half.read_bytes()[:100])
    (tmp_path / "a.parquet").write_text("none")
    paths = [broken, several, half.parent, tmp_path, *(tmp_path / f"a.{end}" for end in ("parquet", "csv", "jsonl"))]
    (tmp_path / "a.csv").touch()
    with pytest.raises(ConfigError) as error:
        read_records(paths, preference=False)
    assert len(error.value.problems) == len(paths)
    assert f"name some; allowed: {several / 'train'}, {several / 'test'}" in error.value.problems[1]
    with pytest.raises(ConfigError, match="there is no example"):
        read_records([lines(tmp_path / "a.jsonl")], preference=False)


SYSTEM = {"role": "system", "content": "Be kind."}
SHARE_GPT = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"conversations": SHARE_GPT}, {"messages": [SYSTEM, USER, ANSWER]}),
        ({"conversations": SHARE_GPT[1:], "system": "Be kind."}, {"messages": [SYSTEM, USER, ANSWER]}),
        ({"conversations": SHARE_GPT, "system": "Be kind."}, {"messages": [SYSTEM, USER, ANSWER]}),
        ({"messages": [USER, ANSWER], "system": ""}, CHAT),
        (  # as NeMo has it
            {
                "system": "Be kind.",
                "mask": "User",
                "conversations": [{"from": "User", "value": "hi"}, {"from": "Assistant", "value": "ho"}],
            },
            {"messages": [SYSTEM, USER, ANSWER]},
        ),
        ({"instruction": "hi", "output": "ho", "system": "Be kind."}, {"messages": [SYSTEM, USER, ANSWER]}),
        ({"instruction": "hi", "output": "ho", "history": []}, CHAT),
        (
            {"prompt": [USER], "completion": [ANSWER], "system": "Be kind."},
            {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        ),
        ({"messages": SHARE_GPT, "id": 3}, {"messages": [SYSTEM, USER, ANSWER]}),
        ({"conversations": [USER, ANSWER]}, CHAT),
        (
            {"conversations": [*SHARE_GPT, {"from": "tool", "value": "5"}, {"from": "gpt", "value": "6", "weight": 0}]},
            {
                "messages": [
                    SYSTEM,
                    USER,
                    ANSWER,
                    {"role": "tool", "content": "5"},
                    {**ANSWER, "content": "6", "weight": 0},
                ]
            },
        ),
        (
            {"instruction": "Name it.", "input": "A fern.", "output": "ho", "text": "Below is"},
            {"messages": [{"role": "user", "content": "Name it.\nA fern."}, ANSWER]},
        ),
        ({"instruction": "hi", "input": "", "output": "ho"}, CHAT),
        ({"instruction": "hi", "output": "ho"}, CHAT),
        ({"input": "2+2=", "output": "4"}, COMPLETION),
        ({"input": [USER], "output": [ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}),
        ({"messages": [{"role": "user", "content": PARTS}, ANSWER]}, CHAT),
        ({"messages": [{"content": "hi", "role": "user", "name": None}, ANSWER]}, CHAT),
        ({"messages": [USER, CALL]}, {"messages": [USER, CALL]}),
        ({"messages": [USER, {**ANSWER, "weight": 0.0}, {**ANSWER, "weight": 1}]}, None),
    ],
)
def test_examples_of_all_shapes_get_one_form(
    given: dict[str, Any], values: dict[str, Any] | None, tmp_path: Path
) -> None:
    (record,) = read_records([lines(tmp_path / "a.jsonl", given)], preference=False)
    assert record.values == (values or given)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, CALL]},
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [CALL]},
        ),
        ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, CALL]}, PAIR | {"rejected": [CALL]}),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, CALL]}, PAIR | {"rejected": [CALL]}),
        (
            {"chosen": SHARE_GPT, "rejected": [*SHARE_GPT[:2], {"from": "gpt", "value": "he"}]},
            {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "he"}]},
        ),
        (  # TRL's own example, and the prompt that it finds
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ),
        (  # but not within a word, as TRL does: its halves are not the tokens that it has in a text
            {"chosen": "The sky is gray.", "rejected": "The sky is green."},
            {"prompt": "The sky is", "chosen": " gray.", "rejected": " green."},
        ),
        (
            {"chosen": "\u5929\u7a7a\u662f\u84dd", "rejected": "\u5929\u7a7a\u662f\u7eff"},
            {"prompt": "\u5929\u7a7a\u662f", "chosen": "\u84dd", "rejected": "\u7eff"},
        ),
        (
            {"chosen": "Q: x\nno", "rejected": "Q: x\nno way"},
            {"prompt": "Q: x\n", "chosen": "no", "rejected": "no way"},
        ),
    ],
)
def test_pairs_of_all_shapes_get_one_form(given: dict[str, Any], values: dict[str, Any], tmp_path: Path) -> None:
    (record,) = read_records([lines(tmp_path / "a.jsonl", given)], preference=True)
    assert record.values == values


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"question": "a", "answer": "b"},
            "needs the fields messages; or conversations; or prompt, completion; or instru",
        ),
        ({"conversation": [USER, ANSWER]}, "unknown field 'conversation'; did you mean 'conversations'?"),
        ({"conversations": "hi"}, "conversations: is text; allowed: a list of messages"),
        ({"conversations": [{"from": "humam", "value": "a"}]}, "[0].from: unknown role 'humam'; did you mean 'human'?"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "conversations[0].value: is null"),
        ({"instruction": "a", "output": ""}, "output: is empty"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history: is not read; write all turns as"),
        ({**COMPLETION, "system": "Be kind."}, "system: has no place beside prompt that is text; write messages"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be rude."}, "system: is another text than that of the system"),
        ({"messages": [USER, ANSWER], "system": [1]}, "system: is a list; allowed: text"),
        ({"conversations": [USER, ANSWER], "mask": "Assistant"}, "mask: is 'Assistant'; allowed: User"),
        ({"instruction": "a", "output": [ANSWER]}, "instruction, input, output: all must be text"),
        ({"instruction": [USER], "output": "b"}, "instruction: is a list; allowed: text"),
        ({"input": "a", "output": [ANSWER]}, "input, output: either all are text or all are lists"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]: is 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": ["hi"]}]},
            'messages[0].content[0]: is \'str\'; allowed: {"type": "text',
        ),
        (
            {"messages": [USER, {**ANSWER, "weight": 0}]},
            "messages: has no message of the assistant to learn",
        ),
        (
            {"messages": [USER, {**ANSWER, "weight": 0.5}]},
            "messages[1].weight: is 0.5; allowed: 0, which is not learned",
        ),
        (
            {"messages": [USER, {**CALL, "content": 5}]},
            "messages[1].content: is a number; allowed: text, or a list of text",
        ),
        (CHAT | {"tools": "[{]"}, "tools: is text that is not valid JSON: column 3"),
        (CHAT | {"tools": {"name": "f"}}, "tools: is an object; allowed: a list of JSON schemas"),
    ],
)
def test_an_example_of_no_known_shape_is_named(record: Any, said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", record)
    with pytest.raises(ConfigError) as error:
        read_records([path], preference=False)
    assert str(error.value).startswith(f"{path}:1: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"chosen": [ANSWER], "rejected": [CALL]}, "has no prompt, and chosen and rejected do not begin alike"),
        ({"chosen": "yes", "rejected": "no"}, "has no prompt, and chosen and rejected do not begin alike"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "chosen: has no message of the assistant"),
        ({"question": "a", "chosen": "yes", "rejected": "yet"}, "is 'question' the prompt? Name it 'prompt'"),
        ({"prompt": "hi", "chosen": [ANSWER], "rejected": [CALL]}, "either all are text or all are lists of messages"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "either all are text or all are lists of messages"),
    ],
)
def test_a_pair_without_a_prompt_is_named(record: Any, said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", record)
    with pytest.raises(ConfigError) as error:
        read_records([path], preference=True)
    assert str(error.value).startswith(f"{path}:1: ") and said in str(error.value)


def test_examples_of_different_shapes_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"conversations": SHARE_GPT}, {"instruction": "hi", "output": "ho"})
    with pytest.raises(
        ConfigError, match=r"a\.jsonl:2: has instruction, output, and the examples before conversations"
    ):
        read_records([path], preference=False)


def test_a_table_s_empty_fields_are_not_in_the_tools(tmp_path: Path) -> None:
    tools = [
        {"name": "f", "parameters": {"x": {"type": "integer"}}},
        {"name": "g", "parameters": {"y": {"type": "null"}}},
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([CHAT | {"tools": tools}, CHAT | {"tools": []}]), tmp_path / "a.parquet"
    )
    assert [each.tools for each in read_records([tmp_path / "a.parquet"], preference=False)] == [tools, None]
