"""Turns examples into tokens; only the tokens of the answers are trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fiddlehead.data.chat_template import ChatTemplate, Message
from fiddlehead.data.progress import ByteProgress
from fiddlehead.data.records import Record, is_learned
from fiddlehead.data.tokenizers import JSONTokenizer
from fiddlehead.errors import ConfigError, Problem, first_of, refuse

NO_TEMPLATE = "messages need a chat template, and the tokenizer has none (chat_template.jinja)"
_AT_ONCE = 1024
_MANY = 10_000  # examples that are worth a progress bar

Asked = tuple[str, str]
"""The text that a model is asked to answer, and that text with the answer."""


@dataclass(frozen=True)
class Example:
    """One text as tokens."""

    ids: np.ndarray
    """(n,) int32."""
    learned: np.ndarray
    """Whether each token belongs to an answer, (n,) bool."""


def tokenize_records(
    records: Sequence[Record], tokenizer: JSONTokenizer, template: ChatTemplate | None, *, progress: bool = False
) -> list[tuple[Example, ...]]:
    """The texts of all records as tokens: alone, or the better and the worse answer of a pair.

    A text is tokenized whole, and begins with the tokens of the question. If the tokenizer would merge the end of the
    question with the beginning of the answer, the answer gets the tokens that it has elsewhere within a text. A
    conversation is one text if each answer in it has the same tokens, after the same tokens, as when the model is asked
    for that answer alone. Otherwise, as with a template that changes earlier answers, each answer has its own text.

    Args:
        progress: show a progress bar if there are many records.

    Raises:
        ConfigError: a conversation needs a template and there is none, or the template refuses it; it lists the first
            twenty problems.
    """
    examples: list[tuple[Example, ...]] = []
    problems: list[Problem] = []
    cuts = template and find_cuts(tokenizer, "".join((template.text, *template.special_tokens.values())))
    many = len(records) >= _MANY
    with ByteProgress("tokenizing", sum(r.num_bytes for r in records) if many else 0, progress and many) as bar:
        for start in range(0, len(records), _AT_ONCE):
            here = records[start : start + _AT_ONCE]
            texts: list[list[list[Asked]]] = []
            for record in here:
                with _naming(record, problems):
                    texts.append(_texts(record, template))
            if not problems:
                encoded = _encoded(here, texts, tokenizer, cuts)
                for record, each in zip(here, texts, strict=True):
                    with _naming(record, problems):
                        examples += _examples(record, each, encoded[record.is_chat], tokenizer)
            bar.advance(sum(record.num_bytes for record in here))
        refuse(first_of(problems))
    return examples


@contextmanager
def _naming(record: Record, problems: list[Problem]) -> Iterator[None]:
    """Adds the problems of a record to `problems`."""
    try:
        yield
    except ConfigError as error:
        problems += [Problem.in_file(record.where, problem) for problem in error.problems]


def _texts(record: Record, template: ChatTemplate | None) -> list[list[Asked]]:
    """For each text, or each answer of a pair: its questions and answers."""
    if not record.is_chat:
        prompt, *answers = record.values.values()
        stem = prompt.rstrip(" ")  # a model that is asked writes these spaces itself (`encode_prompt`)
        return [[(stem, prompt + answer)] for answer in answers]
    if template is None:
        raise ConfigError(NO_TEMPLATE)
    prompt, *answers = ([], record.values["messages"]) if "messages" in record.values else record.values.values()
    return [_answers(prompt, answer, template, record.tools) for answer in answers]


def _answers(
    prompt: Sequence[Message], rest: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None
) -> list[Asked]:
    messages = [{name: value for name, value in message.items() if name != "weight"} for message in (*prompt, *rest)]
    learned = [len(prompt) + number for number, message in enumerate(rest) if is_learned(message)]
    return [template.answer(messages, number, tools) for number in learned]


def _encoded(
    records: Sequence[Record],
    texts: Sequence[list[list[Asked]]],
    tokenizer: JSONTokenizer,
    cuts: re.Pattern[str] | None,
) -> dict[bool, dict[str, list[int]]]:
    """The tokens of every text by whether it is a conversation: only there do special tokens' names count as such."""
    found: dict[bool, dict[str, list[int]]] = {}
    for is_chat in (False, True):
        all_texts = dict.fromkeys(
            text
            for record, each in zip(records, texts, strict=True) if record.is_chat == is_chat
            for answers in each for asked in answers for text in asked
        )  # fmt: skip
        pieces = {text: cuts.split(text) if cuts and is_chat else [text] for text in all_texts}
        encode = tokenizer.encode_batch_with_special if is_chat else tokenizer.encode_batch
        different = list(dict.fromkeys(piece for each in pieces.values() for piece in each))
        ids = dict(zip(different, encode(different), strict=True))
        found[is_chat] = {text: [i for piece in each for i in ids[piece]] for text, each in pieces.items()}
    return found


def find_cuts(tokenizer: JSONTokenizer, markup: str) -> re.Pattern[str] | None:
    """A pattern that matches before each special token of a template, where a text can be cut into pieces.

    The texts of one conversation begin alike, so most of their pieces are the same and are tokenized once. A token that
    absorbs the text before it, or that another added token may absorb, is not a place to cut.

    Args:
        markup: a text with the template's special tokens.
    """
    added = tokenizer.added_tokens()
    names = [token.content for token in added]
    cuts = [
        re.escape(token.content)
        for token in added
        if token.special and token.content in markup and not (token.lstrip or token.normalized or token.single_word)
        if not any(_takes_in(other, token.content) for other in names if other != token.content)
    ]
    return re.compile(f"(?={'|'.join(cuts)})") if cuts else None


def _takes_in(other: str, token: str) -> bool:
    """Whether one token may match in a text in place of another that begins later or at the same place."""
    return token in other or any(other.endswith(token[:size]) for size in range(1, len(token)))


def _examples(
    record: Record, texts: list[list[Asked]], encoded: dict[str, list[int]], tokenizer: JSONTokenizer
) -> list[tuple[Example, ...]]:
    """The examples of a record."""
    encode = tokenizer.encode_with_special if record.is_chat else tokenizer.encode
    found: list[list[Example]] = []
    for answers in texts:
        ids = [(encoded[asked], encoded[whole]) for asked, whole in answers]
        if _in_one(ids):
            found.append([_example(ids[-1][1], [(len(asked), len(whole)) for asked, whole in ids])])
            continue
        found.append([])
        for (asked, whole), (before, text) in zip(answers, ids, strict=True):
            answer = text[len(before) :] if _begins(text, before) else _within_a_text(whole[len(asked) :], encode)
            found[-1].append(_example([*before, *answer], [(len(before), len(before) + len(answer))]))
    if not record.is_chat:  # a template's text has its own begin and end of a turn
        found = [[_as_a_document(text, tokenizer) for text in each] for each in found]
    if len(found) == 1:
        return [(text,) for text in found[0]]
    if any(len(each) > 1 for each in found):
        raise ConfigError(
            "chosen or rejected has several answers, and the chat template changes the earlier ones; give one answer, "
            "with the messages before it in the prompt"
        )
    return [tuple(text for each in found for text in each)]


def _in_one(answers: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Whether the last text contains every answer with the same tokens, after the same tokens, as on its own."""
    text = answers[-1][1]
    return all(_begins(text, whole) and _begins(whole, asked) for asked, whole in answers)


def _begins(text: list[int], beginning: list[int]) -> bool:
    return text[: len(beginning)] == beginning


def _within_a_text(answer: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The tokens of an answer within a text, after something with which it does not merge.

    At the beginning of a text many tokenizers add a space.
    """
    for before in ("\n", "0", "a", "."):
        ids, text = encode(before), encode(before + answer)
        if ids and _begins(text, ids):
            return text[len(ids) :]
    raise ConfigError(f"the tokenizer merges the answer with whatever is before it: {answer[:40]!r}")


def _example(ids: list[int], learned: Iterable[tuple[int, int]]) -> Example:
    is_learned = np.zeros(len(ids), dtype=bool)
    for start, end in learned:
        is_learned[start:end] = True
    return Example(np.asarray(ids, dtype=np.int32), is_learned)


def _as_a_document(text: Example, tokenizer: JSONTokenizer) -> Example:
    """An example whose prompt is as in `encode_prompt`, and whose answer ends."""
    begin = tokenizer.begin_ids
    if not begin and text.learned[:1].all():
        begin = [tokenizer.eos_id]
    ids = [*begin, *text.ids.tolist(), tokenizer.eos_id]
    return Example(np.asarray(ids, dtype=np.int32), np.concatenate([np.zeros(len(begin), bool), text.learned, [True]]))
