"""Examples of what to answer, in files: conversations, prompts with completions, and pairs of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.tokenizers import JSONTokenizer
from fiddlehead.errors import ConfigError, unknown

ROLES = ("system", "developer", "user", "assistant", "tool")
KINDS = (("messages",), ("prompt", "completion"), ("prompt", "chosen", "rejected"))
"""The fields of each kind of example."""
_SHOWN = 20

Turns = list[tuple[str, bool]]
"""Pieces of text, each with whether it is an answer."""


@dataclass(frozen=True)
class Example:
    """One text as tokens."""

    ids: np.ndarray
    """(n,) int64."""
    learned: np.ndarray
    """Whether each token belongs to an answer, (n,) bool."""


@dataclass(frozen=True)
class Record:
    """One line or row, checked."""

    where: str
    """Its file and number."""
    values: Mapping[str, Any]


def read_records(paths: Sequence[Path], *, preference: bool) -> list[Record]:
    """The examples in JSONL and Parquet files, and in folders that `datasets` saved to disk.

    Args:
        preference: whether they are pairs of answers.

    Raises:
        ConfigError: a file or an example is not what it should be; it lists all of them, up to twenty.
    """
    records, problems = [], []
    for path in paths:
        try:
            for where, values in _rows(path):
                found = [values] if isinstance(values, str) else list(_problems(values, preference))
                problems += [f"{where}: {problem}" for problem in found]
                if isinstance(values, dict) and not found:
                    records.append(Record(where, values))
        except ConfigError as error:
            problems += error.problems
    if not problems and not records:
        problems.append(f"paths: {', '.join(map(str, paths))}: there is no example")
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN:,} more"]
    if problems:
        raise ConfigError(*problems)
    return records


def tokenize_records(
    records: Sequence[Record], tokenizer: JSONTokenizer, template: ChatTemplate | None
) -> list[tuple[Example, ...]]:
    """Each record's text, or the texts of its better and its worse answer, as tokens.

    Raises:
        ConfigError: a conversation needs a template that there is not, or that refuses it.
    """
    texts: list[list[Turns]] = []
    problems = []
    for record in records:
        try:
            texts.append(_texts(record.values, template))
        except ConfigError as error:
            problems += [f"{record.where}: {problem}" for problem in error.problems]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN:,} more"]
    if problems:
        raise ConfigError(*problems)
    return [
        tuple(_encode(turns, record.values, tokenizer) for turns in each)
        for each, record in zip(texts, records, strict=True)
    ]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """File and number of each row, and its values, or what is wrong with it."""
    if path.is_dir():
        state = path / "state.json"
        if not state.is_file():
            raise ConfigError(
                f"paths: {path} is a folder, but none that `datasets` saved to disk: it has no state.json"
            )
        for file in json.loads(state.read_text())["_data_files"]:
            yield from _arrow_rows(path / file["filename"])
    elif not path.is_file():
        raise ConfigError(f"paths: there is no file or folder {path}")
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except Exception as error:  # pyarrow has many
            raise ConfigError(f"paths: {path} cannot be read: {error}") from error
        yield from ((f"{path}:{number}", row) for number, row in enumerate(table.to_pylist(), start=1))
    else:
        raise ConfigError(f"paths: {path} is of an unknown kind; allowed: .jsonl, .parquet, a folder of `datasets`")


def _arrow_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source:
            rows = pyarrow.ipc.open_stream(source).read_all().to_pylist()
    except Exception as error:  # pyarrow has many
        raise ConfigError(f"paths: {file} cannot be read: {error}") from error
    yield from ((f"{file}:{number}", row) for number, row in enumerate(rows, start=1))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return f"is no JSON: column {error.colno}: {error.msg}"


def _problems(values: Any, preference: bool) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"is a {type(values).__name__}, not an object with fields"
        return
    kinds = [kind for kind in KINDS if ("chosen" in kind) == preference]
    given = [name for name, value in values.items() if value is not None]
    kind = next((kind for kind in kinds if all(name in given for name in kind)), None)
    if kind is None:
        wanted = " or ".join(", ".join(kind) for kind in kinds)
        known = [name for kind in kinds for name in kind]
        near = [unknown("field", name, known) for name in given if name not in known]
        yield f"needs the fields {wanted}, and has {', '.join(given) or 'none'}" + (f": {near[0]}" if near else "")
        return
    for name in kind:
        value = values[name]
        if isinstance(value, list):
            yield from (f"{name}{problem}" for problem in _message_problems(value))
        elif not isinstance(value, str):
            yield f"{name}: is a {type(value).__name__}; allowed: text, or a list of messages"
        elif name == "messages":
            yield "messages: is text; allowed: a list of messages"
        elif name != "prompt" and not value:
            yield f"{name}: is empty"
    if kind == ("messages",) and isinstance(values["messages"], list):
        roles = [message.get("role") for message in values["messages"] if isinstance(message, dict)]
        if "assistant" not in roles:
            yield "messages: none is the assistant's, so that there is nothing to learn"
    if len({isinstance(values[name], list) for name in kind}) > 1:
        yield f"{', '.join(kind)}: either all are text or all are lists of messages"


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


def _texts(values: Mapping[str, Any], template: ChatTemplate | None) -> list[Turns]:
    if "messages" in values and values["messages"] is not None:
        return [_conversation(values["messages"], template)]
    prompt, answers = (
        values["prompt"],
        [values[name] for name in ("completion", "chosen", "rejected") if values.get(name)],
    )
    if isinstance(prompt, str):
        return [[(prompt, False), (answer, True)] for answer in answers]
    return [_conversation([*prompt, *answer], template) for answer in answers]


def _conversation(messages: Sequence[Any], template: ChatTemplate | None) -> Turns:
    if template is None:
        raise ConfigError("messages need a chat template, and the tokenizer has none (chat_template.jinja)")
    return template.turns(messages)


def _encode(turns: Turns, values: Mapping[str, Any], tokenizer: JSONTokenizer) -> Example:
    """Piece by piece, as a model that is asked has the question as a text of its own."""
    is_chat = not isinstance(values.get("prompt"), str)
    encode = tokenizer.encode_with_special if is_chat else tokenizer.encode
    pieces = [(encode(text), learned) for text, learned in turns]
    if not is_chat:
        pieces.append(([tokenizer.eos_id], True))
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in pieces])
    learned = np.concatenate([np.full(len(ids), flag) for ids, flag in pieces])
    return Example(ids, learned)
