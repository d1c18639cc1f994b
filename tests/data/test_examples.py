"""Examples as tokens, divided into prompts and answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from fiddlehead.data import ByteTokenizer, TokenizerFile
from fiddlehead.data import examples as module
from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.examples import Example, find_cuts, tokenize_records
from fiddlehead.data.records import read_records
from fiddlehead.errors import ConfigError
from tests.data import small_tokenizers
from tests.data.small_tokenizers import KINDS, change
from tests.data.test_chat_template import CHATML, MESSAGES
from tests.data.test_records import ANSWER, CHAT, USER, lines


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


def with_a_first_mark(scheme: str) -> Callable[[Path], Path]:
    """Like `save_llama2`, with the space put in front of a text by what cuts it into words: T5's and new Mistrals'."""

    def save(folder: Path) -> Path:
        pre_tokenizer = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme,
            "split": scheme == "always",
        }
        change(small_tokenizers.save_llama2(folder) / "tokenizer.json", pre_tokenizer=pre_tokenizer)
        spec = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": None}))
        return folder

    return save


def save_bytes_with_prefix(folder: Path) -> Path:
    """Byte-level BPE with a space in front of every text, as in RoBERTa's."""
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    change(small_tokenizers.save_qwen(folder) / "tokenizer.json", pre_tokenizer=pre_tokenizer)
    return folder


ALL_KINDS = {
    **KINDS,
    "first": with_a_first_mark("first"),
    "always": with_a_first_mark("always"),
    "prefix": save_bytes_with_prefix,
}
TEXTS = [
    ("What is a fern?", "A plant."),
    ("What is a fern?", " A plant."),
    ("def f_1(x):\n", "    return x"),
    ("def f_1(x):\n    ", "return x"),
    ("4 * 2 = ", "8"),
    ("A stra\u00dfe", "\u6f22 </s> <|im_end|> <eos>"),
    ("", "A plant."),
]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_text_has_the_tokens_of_the_whole_and_begins_as_a_model_is_asked(kind: str, tmp_path: Path) -> None:
    folder = ALL_KINDS[kind](tmp_path / "tokenizer")
    theirs, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), TokenizerFile(folder)
    theirs.encode_special_tokens = True
    given = [{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS]
    records = read_records([lines(tmp_path / "a.jsonl", *given)], preference=False)
    for (text,), (prompt, completion) in zip(tokenize_records(records, ours, None), TEXTS, strict=True):
        whole = theirs.encode(prompt + completion).ids
        begin = [] if prompt or ours.begin_ids else [ours.eos_id]
        assert text.ids.tolist() == [*begin, *whole, ours.eos_id]
        asked = ours.encode_prompt(prompt)
        assert text.learned.tolist() == [False] * len(asked) + [True] * (len(text.ids) - len(asked))
        assert text.ids[: len(asked)].tolist() == asked


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_both_answers_of_a_pair_have_the_tokens_of_the_whole(kind: str, tmp_path: Path) -> None:
    ours = TokenizerFile(ALL_KINDS[kind](tmp_path / "tokenizer"))
    pair = {"prompt": "What is a fern?\n", "chosen": "A plant.", "rejected": "    return"}
    ((better, worse),) = tokenize_records(
        read_records([lines(tmp_path / "a.jsonl", pair)], preference=True), ours, None
    )
    for text, answer in ((better, "A plant."), (worse, "    return")):
        assert text.ids.tolist() == [*ours.begin_ids, *ours.encode(pair["prompt"] + answer), ours.eos_id]
        assert text.ids[~text.learned].tolist() == ours.encode_prompt(pair["prompt"])


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(("prompt", "answer"), [("A pla", "nt."), ("What is a fer", "n? A plant"), ("d", "ef f_1")])
def test_a_model_is_asked_with_the_same_tokens_if_the_answer_goes_on_within_a_word(
    prompt: str, answer: str, kind: str, tmp_path: Path
) -> None:
    ours = TokenizerFile(ALL_KINDS[kind](tmp_path / "tokenizer"))
    records = read_records([lines(tmp_path / "a.jsonl", {"prompt": prompt, "completion": answer})], preference=False)
    ((text,),) = tokenize_records(records, ours, None)
    asked = ours.encode_prompt(prompt)
    assert text.ids[: len(asked)].tolist() == asked and not text.learned[: len(asked)].any()
    assert ours.decode(text.ids[:-1].tolist()).strip(" ") == prompt + answer
    marked = ours.encode("x\n" + answer)
    assert text.ids[len(asked) : -1].tolist() == marked[len(ours.encode("x\n")) :]


def test_a_table_s_empty_columns_are_not_in_the_messages(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    calls = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([calls, CHAT]), tmp_path / "a.parquet")
    records = read_records([tmp_path / "a.parquet"], preference=False)
    assert [record.values for record in records] == [calls, CHAT]
    template = ChatTemplate("{% for m in messages %}{{ m.keys() | list }};{% endfor %}", {})
    (text,), (other,) = tokenize_records(records, chat_tokenizer, template)
    assert "tool_calls" in chat_tokenizer.decode(text.ids.tolist())
    assert "tool_calls" not in chat_tokenizer.decode(other.ids.tolist())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pieces_between_special_tokens_have_the_tokens_of_the_whole(kind: str, tmp_path: Path) -> None:
    tokenizer = TokenizerFile(ALL_KINDS[kind](tmp_path / "tokenizer"))
    names = [token.content for token in tokenizer.added_tokens()]
    cuts = find_cuts(tokenizer, "".join(names))
    assert cuts
    choices, generator = [*names, " ", "\n", "\n\n", "def f", "A plant.", "s", "[INST] "], random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices(choices, k=9))
        assert [i for piece in cuts.split(text) for i in tokenizer.encode_with_special(piece)] == (
            tokenizer.encode_with_special(text)
        )


def test_a_text_is_not_cut_within_a_token(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    end = spec["added_tokens"][0]
    longer = [("<|im_end|>\n", {}), ("x<|im", {}), ("<|left|>", {"lstrip": True}), ("<|plain|>", {"special": False})]
    spec["added_tokens"] += [{**end, "id": 259 + n, "content": name, **how} for n, (name, how) in enumerate(longer)]
    path.write_text(json.dumps(spec))
    tokenizer = TokenizerFile(path)
    cuts = find_cuts(tokenizer, "".join(token.content for token in tokenizer.added_tokens()))
    assert cuts and cuts.split("a<|endoftext|>b <|left|><|plain|><|im_end|>\n<|im_start|>") == [
        "a", "<|endoftext|>b <|left|><|plain|><|im_end|>\n<|im_start|>"
    ]  # fmt: skip
    assert find_cuts(tokenizer, "plain") is None


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "integer"}}}}
CHATS: list[list[dict[str, Any]]] = [
    [USER, ANSWER, {**USER, "content": " more\n"}, {**ANSWER, "content": "A plant."}],
    [{"role": "system", "content": "Be kind."}, USER, ANSWER, USER, {**ANSWER, "content": "    return x"}, USER],
    [{**ANSWER, "content": "\nWhat is it?"}, USER, ANSWER],
    [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}, USER, ANSWER],
]


GENERATION_PROMPTS = {
    "qwen": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>model\n",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("messages", CHATS)
def test_each_answer_has_the_tokens_and_comes_after_those_of_transformers(
    messages: list[dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = KINDS[kind](tmp_path / "tokenizer")
    theirs, ours, template = (
        transformers.AutoTokenizer.from_pretrained(folder), TokenizerFile(folder), ChatTemplate.load(folder)
    )  # fmt: skip
    assert template is not None
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=template.text, **template.special_tokens
    )
    records = read_records([lines(tmp_path / "a.jsonl", {"messages": messages})], preference=False)
    if kind == "llama2" and messages[0]["role"] != "user":
        with pytest.raises(ConfigError, match="roles must alternate"):
            tokenize_records(records, ours, template)
        return
    found = tokenize_records(records, ours, template)
    sent = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    answers = [n for n, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight", 1)]
    assert len(found) == (len(answers) if kind == "qwen" else 1)
    learned: list[list[int]] = []
    for number in answers:
        whole = theirs.apply_chat_template(sent[: number + 1], return_dict=False)
        (text,) = found[len(learned)] if kind == "qwen" else found[0]
        assert text.ids[: len(whole)].tolist() == whole
        if number:
            asked = theirs.apply_chat_template(sent[:number], add_generation_prompt=True, return_dict=False)
            assert whole[: len(asked)] == asked
        else:
            before, prompt, _ = template.render(sent[:1]).partition(GENERATION_PROMPTS[kind])
            asked = ours.encode_with_special(before + prompt)
        assert not text.learned[len(asked) - 1] and text.learned[len(asked) : len(whole)].all()
        learned.append(whole[len(asked) :])
    assert sum(int(text.learned.sum()) for (text,) in found) == sum(map(len, learned))


def test_an_answer_that_a_token_would_begin_too_early_comes_after_what_asks_for_it(tmp_path: Path) -> None:
    folder = KINDS["gemma"](tmp_path / "tokenizer")  # whose token for two line breaks would be half of the question
    ours, given = TokenizerFile(folder), ChatTemplate.load(folder)
    assert given is not None
    template = ChatTemplate(given.text.replace("| trim", ""), given.special_tokens)
    messages = [USER, {**ANSWER, "content": "\nho"}, USER, ANSWER]
    records = read_records([lines(tmp_path / "a.jsonl", {"messages": messages})], preference=False)
    asked = ours.encode_with_special(template.render(messages[:1], add_generation_prompt=True))
    (first,), (second,) = tokenize_records(records, ours, template)
    assert first.ids.tolist() == [*asked, *ours.encode_with_special("\nho<end_of_turn>\n")]
    assert first.learned.tolist() == [False] * len(asked) + [True] * (len(first.ids) - len(asked))
    assert second.ids.tolist() == ours.encode_with_special(template.render(messages))


PHI = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
"""As Phi 3's, it ends every conversation with the end of a document."""


def test_every_answer_ends_as_the_template_ends_it(tmp_path: Path, chat_tokenizer: TokenizerFile) -> None:
    template = ChatTemplate(PHI, {"eos_token": "<|endoftext|>"})
    records = read_records([lines(tmp_path / "a.jsonl", {"messages": MESSAGES})], preference=False)
    for (text,), number in zip(tokenize_records(records, chat_tokenizer, template), (1, 3), strict=True):
        assert text.ids.tolist() == chat_tokenizer.encode_with_special(template.render(MESSAGES[: number + 1]))
        answer = MESSAGES[number]["content"] + "<|im_end|>\n<|endoftext|>"
        assert text.ids[text.learned].tolist() == chat_tokenizer.encode_with_special(answer)


def test_tools_are_in_the_text_and_all_rounds_of_a_call_are_learned(
    tmp_path: Path, chat_tokenizer: TokenizerFile
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    messages = [USER, call, {"role": "tool", "content": "5"}, ANSWER]
    template = ChatTemplate("{{ tools | tojson }}" + CHATML.replace("message.content +", "message | tojson +"), {})
    for tools in ([TOOL], json.dumps([TOOL])):  # a list, or its text, as tables have it
        path = lines(tmp_path / "a.jsonl", {"messages": messages, "tools": tools})
        ((text,),) = tokenize_records(read_records([path], preference=False), chat_tokenizer, template)
        whole = template.render(messages, tools=[TOOL])
        assert text.ids.tolist() == chat_tokenizer.encode_with_special(whole) and whole.startswith(json.dumps([TOOL]))
        answers = "".join(json.dumps(message) + "<|im_end|>\n" for message in (call, ANSWER))
        assert text.ids[text.learned].tolist() == chat_tokenizer.encode_with_special(answers)


def test_a_pair_is_compared_after_the_tokens_that_ask_for_it(tmp_path: Path) -> None:
    folder = KINDS["qwen"](tmp_path / "tokenizer")
    ours, template = TokenizerFile(folder), ChatTemplate.load(folder)
    assert template is not None
    asked = [USER, ANSWER, USER]
    pair = {"prompt": asked, "chosen": [{**ANSWER, "content": "yes"}], "rejected": [ANSWER]}
    path = lines(tmp_path / "a.jsonl", pair)
    ((better, worse),) = tokenize_records(read_records([path], preference=True), ours, template)
    for text, answer in ((better, pair["chosen"]), (worse, pair["rejected"])):
        assert text.ids.tolist() == ours.encode_with_special(template.render([*asked, *answer]))
        question = ours.encode_with_special(template.render(asked, add_generation_prompt=True))
        assert text.ids[~text.learned].tolist() == question == text.ids[: len(question)].tolist()
    path = lines(tmp_path / "b.jsonl", pair | {"chosen": [ANSWER, USER, ANSWER]})
    with pytest.raises(ConfigError, match=r"b\.jsonl:1: chosen or rejected has several answers"):
        tokenize_records(read_records([path], preference=True), ours, template)


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
def test_training_and_generation_use_the_same_prompt_tokens(
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
