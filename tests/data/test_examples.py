"""Examples in files: read, checked, and told apart into what is asked and what is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fiddlehead.data import BPETokenizer, ByteTokenizer, TokenizerFile
from fiddlehead.data import examples as module
from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.examples import Example, read_records, tokenize_records
from fiddlehead.errors import ConfigError
from tests.data.test_chat_template import CHATML, MESSAGES

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
COMPLETION: dict[str, Any] = {"prompt": "2+2=", "completion": "4"}
CHAT: dict[str, Any] = {"messages": [USER, ANSWER]}
PAIR: dict[str, Any] = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}


def lines(path: Path, *records: Any) -> Path:
    texts = (record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def with_begin(path: Path, tokenizer: TokenizerFile) -> TokenizerFile:
    """The same one, that puts a token in front of every text."""
    spec = json.loads((tokenizer.path if tokenizer.path.is_file() else tokenizer.path / "tokenizer.json").read_text())
    end = spec["added_tokens"][0]
    spec["added_tokens"].append({**end, "id": tokenizer.vocab_size, "content": "<s>"})
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [tokenizer.vocab_size], "tokens": ["<s>"]}},
    }
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps(spec))
    return TokenizerFile(path)


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> TokenizerFile:
    """Bytes, and the two tokens of ChatML."""
    path = tmp_path / "tokenizer.json"
    ByteTokenizer().save(path)
    spec = json.loads(path.read_text())
    (end,) = spec["added_tokens"]
    spec["added_tokens"] += [{**end, "id": 257, "content": "<|im_start|>"}, {**end, "id": 258, "content": "<|im_end|>"}]
    path.write_text(json.dumps(spec))
    return TokenizerFile(path)


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
        (b"{", "is no JSON: column "),
        (b"[" * 100_000, "nested too deep"),
        (b'{"prompt": "a", "completion": "\xff"}', "is no UTF-8: byte 0xff at 31"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "is no Unicode: has half a surrogate pair"),
        ([1], "is a list, not an object with fields"),
        ("prompt", "is a str, not an object with fields"),
        ({"promt": "a", "completion": "b"}, "has promt, completion: unknown field 'promt'; did you mean 'prompt'?"),
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"prompt": "a", "completion": 3}, "completion: is a int"),
        ({"prompt": [USER], "completion": [USER]}, "completion: none is the assistant's"),
        ({"messages": "hi"}, "messages: is text; allowed: a list of messages"),
        (CHAT, "has messages, and the examples before prompt, completion; allowed: one kind for all"),
        ({"messages": [USER]}, "none is the assistant's"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content: is a NoneType"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0].content: is empty"),
        ({"messages": ["hi"]}, "messages[0]: is no message with a role and a content"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "needs the fields messages or prompt, completion"),
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
        ({"chosen": [USER]}, "chosen: none is the assistant's"),
        ({"rejected": []}, "rejected: none is the assistant's"),
        ({"rejected": "b"}, "either all are text or all are lists of messages"),
        ({"rejected": None}, "needs the fields prompt, chosen, rejected, and has prompt, chosen"),
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
    assert f"one or more of {several / 'train'}, {several / 'test'}" in error.value.problems[1]
    with pytest.raises(ConfigError, match="there is no example"):
        read_records([lines(tmp_path / "a.jsonl")], preference=False)


def test_tokens_and_answers_are_those_of_transformers(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    marked = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}\
{% generation %}{{ message.content + '<|im_end|>' + '\\n' }}{% endgeneration %}\
{% else %}{{ message.content + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    records = read_records([lines(tmp_path / "a.jsonl", {"messages": MESSAGES}, CHAT)], preference=False)
    for template in (CHATML, marked):
        found = tokenize_records(records, chat_tokenizer, ChatTemplate(template, {}))
        for (text,), messages in zip(found, (MESSAGES, CHAT["messages"]), strict=True):
            expected = theirs.apply_chat_template(
                messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
            )
            assert text.ids.tolist() == expected["input_ids"]
            assert text.learned.tolist() == [bool(learned) for learned in expected["assistant_masks"]]


def test_answers_in_the_prompt_are_not_learned(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    pair = {"prompt": [USER, ANSWER, USER], "chosen": [{**ANSWER, "content": "yes"}], "rejected": [ANSWER]}
    records = read_records([lines(tmp_path / "a.jsonl", pair)], preference=True)
    (both,) = tokenize_records(records, chat_tokenizer, ChatTemplate(CHATML, {}))

    def learned(text: Example) -> list[int]:
        return text.ids[text.learned].tolist()

    assert [learned(text) for text in both] == [[*b"yes", 258, 10], [*b"ho", 258, 10]]


def test_text_is_tokenized_piece_by_piece_and_its_special_names_are_text(tmp_path: Path) -> None:
    tokenizer = BPETokenizer(275).train(["the ferns and the mosses of the forest" * 3] * 10)
    given = [{"prompt": f"the fern{i}", "completion": "s <|endoftext|> the moss"} for i in range(5)]
    records = read_records([lines(tmp_path / "a.jsonl", *given)], preference=False)
    for (text,), example in zip(tokenize_records(records, tokenizer, None), given, strict=True):
        prompt, completion = tokenizer.encode(example["prompt"]), tokenizer.encode(example["completion"])
        assert text.ids.tolist() == [*prompt, *completion, tokenizer.eos_id]
        assert text.learned.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
        assert text.ids.tolist().count(tokenizer.eos_id) == 1


def test_a_table_s_empty_columns_are_not_in_the_messages(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    calls = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([calls, CHAT]), tmp_path / "a.parquet")
    records = read_records([tmp_path / "a.parquet"], preference=False)
    assert [record.values for record in records] == [calls, CHAT]
    template = ChatTemplate("{% for m in messages %}{{ m.keys() | list }};{% endfor %}", {})
    (text,), (other,) = tokenize_records(records, chat_tokenizer, template)
    assert "tool_calls" in chat_tokenizer.decode(text.ids.tolist())
    assert "tool_calls" not in chat_tokenizer.decode(other.ids.tolist())


def test_all_that_a_template_refuses_is_named(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    records = read_records([lines(tmp_path / "a.jsonl", CHAT, CHAT)], preference=False)
    with pytest.raises(ConfigError) as error:
        tokenize_records(records, chat_tokenizer, ChatTemplate("{{ raise_exception('no') }}", {}))
    assert error.value.problems == (
        f"{tmp_path}/a.jsonl:1: chat_template: no",
        f"{tmp_path}/a.jsonl:2: chat_template: no",
    )


def test_progress_is_shown_for_many(
    tmp_path: Path, chat_tokenizer: TokenizerFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    records = read_records([lines(tmp_path / "a.jsonl", *[CHAT] * 5)], preference=False)
    template = ChatTemplate(CHATML, {})
    few = tokenize_records(records, chat_tokenizer, template, progress=True)
    assert not capsys.readouterr().err
    monkeypatch.setattr(module, "_MANY", 5)
    many = tokenize_records(records, chat_tokenizer, template, progress=True)
    assert "tokenizing: 0.0 of 0.0 MB" in capsys.readouterr().err
    assert [text.ids.tolist() for (text,) in many] == [text.ids.tolist() for (text,) in few] and len(many) == 5


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("prompt", ["the fern", "the fern  ", "", " "])
def test_what_is_learned_from_is_what_the_model_is_asked(
    prompt: str, begin: bool, tmp_path: Path, chat_tokenizer: TokenizerFile
) -> None:
    tokenizer = with_begin(tmp_path / "begin", chat_tokenizer) if begin else chat_tokenizer
    records = read_records([lines(tmp_path / "a.jsonl", {"prompt": prompt, "completion": "ivy"})], preference=False)
    ((text,),) = tokenize_records(records, tokenizer, None)
    asked = text.ids[~text.learned].tolist()
    assert asked == tokenizer.encode_prompt(prompt) == text.ids[: len(asked)].tolist()
    assert len(asked) == begin + len(prompt.strip()) or asked == [tokenizer.eos_id]
    spaces = prompt[len(prompt.rstrip(" ")) :]
    assert text.ids[text.learned].tolist() == [*tokenizer.encode(spaces + "ivy"), tokenizer.eos_id]


def test_a_template_begins_a_text_itself(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    tokenizer = with_begin(tmp_path / "begin", chat_tokenizer)
    template = ChatTemplate("{{ bos_token }}" + CHATML, {"bos_token": "<s>"})
    records = read_records([lines(tmp_path / "a.jsonl", CHAT)], preference=False)
    ((text,),) = tokenize_records(records, tokenizer, template)
    assert text.ids.tolist().count(tokenizer.begin_ids[0]) == 1 and text.ids[0] == tokenizer.begin_ids[0]
