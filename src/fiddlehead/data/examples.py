"""Examples of what to answer, in files: conversations, prompts with completions, and pairs of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.progress import ByteProgress
from fiddlehead.data.tokenizers import JSONTokenizer
from fiddlehead.errors import ConfigError, unknown

ROLES = ("system", "developer", "user", "assistant", "tool")
KINDS = (("messages",), ("prompt", "completion"), ("prompt", "chosen", "rejected"))
"""The fields of each kind of example."""
_SHOWN = 20
_AT_ONCE = 1024
_MANY = 10_000  # examples that are worth a progress bar

Turns = list[tuple[str, bool]]
"""Pieces of text, each with whether it is an answer."""


@dataclass(frozen=True)
class Example:
    """One text as tokens."""

    ids: np.ndarray
    """(n,) int32."""
    learned: np.ndarray
    """Whether each token belongs to an answer, (n,) bool."""


@dataclass(frozen=True)
class Record:
    """One line or row, checked."""

    where: str
    """Its file and number."""
    values: Mapping[str, Any]
    """The fields of its kind, in the kind's order."""

    @property
    def is_chat(self) -> bool:
        """Whether it is messages, which a template makes text of, and not text as it is."""
        return isinstance(next(iter(self.values.values())), list)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of its texts."""
        texts: list[str] = []
        for value in self.values.values():
            texts += [value] if isinstance(value, str) else [message.get("content") or "" for message in value]
        return sum(len(text.encode()) for text in texts)


def read_records(paths: Sequence[Path], *, preference: bool) -> list[Record]:
    """The examples in JSONL and Parquet files, and in folders that `datasets` saved to disk.

    Args:
        preference: whether they are pairs of answers.

    Raises:
        ConfigError: a file or an example is not what it should be; it lists all of them, up to twenty.
    """
    records: list[Record] = []
    problems: list[str] = []
    first: tuple[str, ...] | None = None
    for path in paths:
        try:
            for where, values, unreadable in _rows(path):
                kind, found = (None, [unreadable]) if unreadable else _check(values, preference)
                first = first or kind
                if kind != first and not found:
                    found = [f"has {_names(kind)}, and the examples before {_names(first)}; allowed: one kind for all"]
                problems += [f"{where}: {problem}" for problem in found]
                if kind and not problems:
                    records.append(Record(where, {name: _without_nulls(values[name]) for name in kind}))
        except ConfigError as error:
            problems += error.problems
    if not problems and not records:
        problems.append(f"paths: {', '.join(map(str, paths))}: there is no example")
    _refuse(problems)
    return records


def tokenize_records(
    records: Sequence[Record], tokenizer: JSONTokenizer, template: ChatTemplate | None, *, progress: bool = False
) -> list[tuple[Example, ...]]:
    """Each record's text, or the texts of its better and its worse answer, as tokens.

    Args:
        progress: show how far it is, where they are many.

    Raises:
        ConfigError: a conversation needs a template that there is not, or that refuses it; it lists up to twenty.
    """
    examples: list[tuple[Example, ...]] = []
    problems: list[str] = []
    many = len(records) >= _MANY
    with ByteProgress("tokenizing", sum(r.num_bytes for r in records) if many else 0, progress and many) as bar:
        for start in range(0, len(records), _AT_ONCE):
            here = records[start : start + _AT_ONCE]
            texts: list[list[Turns]] = []
            for record in here:
                try:
                    texts.append(_texts(record, template))
                except ConfigError as error:
                    problems += [f"{record.where}: {problem}" for problem in error.problems]
            if not problems:
                examples += _encode(here, texts, tokenizer)
            bar.advance(sum(record.num_bytes for record in here))
        _refuse(problems)
    return examples


def parse_line(line: bytes) -> tuple[Any, str]:
    """The values of a line of JSONL, and why they cannot be read, or nothing."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return None, f"is no UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
    except UnicodeEncodeError:
        return None, "is no Unicode: has half a surrogate pair"
    except json.JSONDecodeError as error:
        return None, f"is no JSON: column {error.colno}: {error.msg}"
    except RecursionError:
        return None, "is no JSON that can be read: nested too deep"
    return values, ""


def _refuse(problems: list[str]) -> None:
    """Raises for problems, if there are any: the first of them, and how many more."""
    if len(problems) > _SHOWN:
        problems = [*problems[:_SHOWN], f"and {len(problems) - _SHOWN:,} more"]
    if problems:
        raise ConfigError(*problems)


def _rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    """File and number of each row, its values, and why it cannot be read, or nothing."""
    if path.is_dir():
        for file in _saved_files(path):
            yield from _arrow_rows(file)
    elif not path.is_file():
        raise ConfigError(f"paths: there is no file or folder {path}")
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", *parse_line(line)
    elif path.suffix == ".parquet":
        yield from _arrow_rows(path)
    else:
        raise ConfigError(f"paths: {path} is of an unknown kind; allowed: .jsonl, .parquet, a folder of `datasets`")


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets` saved to disk."""
    state, splits = folder / "state.json", folder / "dataset_dict.json"
    try:
        if splits.is_file():
            names = ", ".join(str(folder / name) for name in json.loads(splits.read_text(encoding="utf-8"))["splits"])
            raise ConfigError(f"paths: {folder} has several data sets; allowed: one or more of {names}")
        if not state.is_file():
            raise ConfigError(f"paths: {folder} is a folder, but none that `datasets` saved: it has no state.json")
        return [folder / file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"paths: {folder} is none that `datasets` saved to disk: {error!r}") from error


def _arrow_rows(file: Path) -> Iterator[tuple[str, Any, str]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.memory_map(str(file)) as source:
            if file.suffix == ".parquet":
                batches = pyarrow.parquet.ParquetFile(source).iter_batches()
            else:
                batches = pyarrow.ipc.open_stream(source)
            for batch in batches:
                for values in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", values, ""
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"paths: {file} cannot be read after row {number}: {error}") from error


def _check(values: Any, preference: bool) -> tuple[tuple[str, ...] | None, list[str]]:
    """The kind of an example, None where it has none, and what is wrong with it."""
    if not isinstance(values, dict):
        return None, [f"is a {type(values).__name__}, not an object with fields"]
    kinds = [kind for kind in KINDS if ("chosen" in kind) == preference]
    given = [name for name, value in values.items() if value is not None]
    kind = next((kind for kind in kinds if all(name in given for name in kind)), None)
    if kind is None:
        known = [name for kind in kinds for name in kind]
        near = [unknown("field", name, known) for name in given if name not in known]
        wanted = " or ".join(map(_names, kinds))
        missing = f"needs the fields {wanted}, and has {_names(given) or 'none'}"
        return None, [missing + (f": {near[0]}" if near else "")]
    problems: list[str] = []  # published datasets have other columns too, which say nothing of the text
    for name in kind:
        problems += _value_problems(name, values[name])
    if len({isinstance(values[name], list) for name in kind}) > 1:
        problems.append(f"{_names(kind)}: either all are text or all are lists of messages")
    return kind, problems


def _value_problems(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, list):
        yield from (f"{name}{problem}" for problem in _message_problems(value))
        roles = [message.get("role") for message in value if isinstance(message, dict)]
        if name != "prompt" and "assistant" not in roles:
            yield f"{name}: none is the assistant's, so that there is nothing to learn"
    elif not isinstance(value, str):
        yield f"{name}: is a {type(value).__name__}; allowed: text, or a list of messages"
    elif name == "messages":
        yield "messages: is text; allowed: a list of messages"
    elif name != "prompt" and not value:
        yield f"{name}: is empty"


def _names(fields: Sequence[str] | None) -> str:
    return ", ".join(fields or ())


def _without_nulls(value: Any) -> Any:
    """Messages without what a table has to have in every row: templates ask whether it is there."""

    def kept(message: Mapping[str, Any]) -> dict[str, Any]:
        return {name: field for name, field in message.items() if field is not None or name == "content"}

    return value if isinstance(value, str) else [kept(message) for message in value]


def _message_problems(messages: list[Any]) -> Iterator[str]:
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            yield f"[{number}]: is no message with a role and a content"
        elif message["role"] not in ROLES:
            yield f"[{number}].role: {unknown('role', message['role'], ROLES)}"
        elif not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            yield f"[{number}].content: is a {type(message.get('content')).__name__}; allowed: text"
        elif message["role"] == "assistant" and not message.get("content") and not message.get("tool_calls"):
            yield f"[{number}].content: is empty"


def _texts(record: Record, template: ChatTemplate | None) -> list[Turns]:
    if not record.is_chat:
        prompt, *answers = record.values.values()
        stem = prompt.rstrip(" ")  # a model that is asked writes these spaces itself (`encode_prompt`)
        return [[(stem, False), (prompt[len(stem) :] + answer, True)] for answer in answers]
    if "messages" in record.values:
        return [_conversation(record.values["messages"], template)]
    prompt, *answers = record.values.values()
    # Turns come in twos, a question and its answer. The prompt's are not to be learned.
    old = 2 * sum(message["role"] == "assistant" for message in prompt)
    conversations = [_conversation([*prompt, *answer], template) for answer in answers]
    return [
        [(text, learned and number >= old) for number, (text, learned) in enumerate(turns)] for turns in conversations
    ]


def _conversation(messages: Sequence[Any], template: ChatTemplate | None) -> Turns:
    if template is None:
        raise ConfigError("messages need a chat template, and the tokenizer has none (chat_template.jinja)")
    return template.turns(messages)


def _encode(
    records: Sequence[Record], texts: Sequence[list[Turns]], tokenizer: JSONTokenizer
) -> Iterator[tuple[Example, ...]]:
    """Piece by piece, as a model that is asked has the question as a text of its own."""
    pieces: dict[bool, list[str]] = {False: [], True: []}
    for record, each in zip(records, texts, strict=True):
        pieces[record.is_chat] += [text for turns in each for text, _ in turns]
    encoded = {
        False: iter(tokenizer.encode_batch(pieces[False])),
        True: iter(tokenizer.encode_batch_with_special(pieces[True])),
    }
    for record, each in zip(records, texts, strict=True):
        found = [[(next(encoded[record.is_chat]), learned) for _, learned in turns] for turns in each]
        if not record.is_chat:  # a template's text has what begins and ends a turn in it
            found = [_as_a_document(turns, tokenizer) for turns in found]
        yield tuple(
            Example(
                np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in turns]),
                np.concatenate([np.full(len(ids), learned) for ids, learned in turns]),
            )
            for turns in found
        )


def _as_a_document(turns: list[tuple[list[int], bool]], tokenizer: JSONTokenizer) -> list[tuple[list[int], bool]]:
    """A prompt as `encode_prompt` has it, and an answer that ends."""
    (prompt, _), *answers = turns
    return [([*tokenizer.begin_ids, *prompt] or [tokenizer.eos_id], False), *answers, ([tokenizer.eos_id], True)]
