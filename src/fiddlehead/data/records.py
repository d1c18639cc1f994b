"""Reads examples with answers, in the usual published formats, into one form."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddlehead.data.chat_template import shared_length
from fiddlehead.data.prompt_template import NEMO_TEMPLATE, PromptTemplate
from fiddlehead.data.record_files import read_rows
from fiddlehead.errors import ConfigError, Problem, first_of, kind_in_json, nearest, refuse
from fiddlehead.files.foreign import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant", "User": "user", "Assistant": "assistant"}
"""The names that ShareGPT, and NeMo's conversations, have for two of the roles."""

Shape = tuple[str, ...]
"""The fields that an example must have."""
ANSWER_SHAPES: tuple[Shape, ...] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("input", "output"),
)
PREFERENCE_SHAPES: tuple[Shape, ...] = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
_QUESTIONS = ("prompt", "input", "instruction")


@dataclass(frozen=True)
class Record:
    """One example, checked and in one form."""

    where: str
    """Its file, and its line or row."""
    values: Mapping[str, Any]
    """`messages`; or `prompt` and `completion`; or `prompt`, `chosen` and `rejected`: text, or lists of messages.

    A message has a `role`, a `content` that is text, and other fields for the template; an answer with `weight` 0 is
    not learned.
    """
    tools: list[Any] | None = None
    """The functions that the assistant can call, for the template."""

    @property
    def is_chat(self) -> bool:
        """Whether it has messages, which a template turns into text."""
        return isinstance(next(iter(self.values.values())), list)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of its texts."""
        texts: list[str] = []
        for value in self.values.values():
            texts += [value] if isinstance(value, str) else [message.get("content") or "" for message in value]
        return sum(len(text.encode()) for text in texts)


def read_records(
    paths: Sequence[Path], *, preference: bool, template: PromptTemplate | None = None, nemo: Collection[Path] = ()
) -> list[Record]:
    """The examples in files of JSON lines, JSON arrays or Parquet, and in folders that `datasets` saved to disk.

    Args:
        preference: whether they are pairs of answers.
        template: makes the text of every example of its fields.
        nemo: those of the paths whose examples of `input` and `output` have NeMo's template, without another.

    Raises:
        ConfigError: with the first twenty problems of the files and examples.
    """
    records: list[Record] = []
    problems: list[str] = []
    first: Shape | None = None
    for path in paths:
        try:
            for where, values, unreadable in read_rows(path):
                shape, record, found = None, None, [unreadable]
                if not unreadable:
                    usual = PREFERENCE_SHAPES if preference else ANSWER_SHAPES
                    if own := template or (NEMO_TEMPLATE if path in nemo and _is_nemo(values) else None):
                        shape, record, found = _read_by_template(where, values, own)
                    else:
                        shape, record, found = _read(where, values, usual)
                first = first or shape
                if shape and shape != first and not found:
                    allowed = "allowed: one shape for all"
                    found = [f"has {_names(shape)}, and the examples before {_names(first or ())}; {allowed}"]
                problems += [Problem.in_file(where, message) for message in found]
                if record and not problems:
                    records.append(record)
        except ConfigError as error:
            problems += error.problems
    if not problems and not records:
        problems.append(Problem("paths", message=f"{', '.join(map(str, paths))}: there is no example"))
    refuse(first_of(problems))
    return records


def _is_nemo(values: Any) -> bool:
    """Whether a row has the fields of NeMo's template, as text, and none of another shape."""
    if not isinstance(values, dict) or any(values.get(name) is not None for name in ("messages", "conversations")):
        return False
    return all(isinstance(values.get(name), str) for name in NEMO_TEMPLATE.fields)


def _read_by_template(
    where: str, values: Any, template: PromptTemplate
) -> tuple[Shape | None, Record | None, list[str]]:
    """As `_read`, of a row whose text the template makes."""
    shape = template.fields
    if not isinstance(values, dict):
        return None, None, [f"is {kind_in_json(values)}, not an object with fields"]
    given = {name: value for name, value in values.items() if value is not None}
    if not all(name in given for name in shape):
        return None, None, [_no_shape(list(given), [shape])]
    problems = [
        f"{name}: is {kind_in_json(given[name])}; prompt_template needs text"
        for name in shape
        if not isinstance(given[name], str)
    ]
    if not problems and not given[shape[-1]].strip(" "):
        problems.append(f"{shape[-1]}: is empty")
    return shape, None if problems else Record(where, template.fill(given)), problems


def _read(where: str, values: Any, shapes: Sequence[Shape]) -> tuple[Shape | None, Record | None, list[str]]:
    """The shape and the record of a row, each None if it has none, and what is wrong with the row."""
    if not isinstance(values, dict):
        return None, None, [f"is {kind_in_json(values)}, not an object with fields"]
    given = {name: value for name, value in values.items() if value is not None}
    shape = next((shape for shape in shapes if all(name in given for name in shape)), None)
    if shape is None:
        return None, None, [_no_shape(list(given), shapes)]
    optional = ("input",) if "instruction" in shape else ()
    read = {name: _read_field(name, given[name]) for name in (*shape, *optional) if name in given}
    problems = [problem for _, found in read.values() for problem in found]
    fields = {name: value for name, (value, _) in read.items()}
    tools = None
    if not problems:  # published data sets have other columns too, which are ignored
        try:
            fields = _in_one_form(shape, fields, given)
            _refuse_columns(given)
            fields = _with_system(fields, given.get("system"))
            tools = _tools(given.get("tools"))
        except ValueError as error:
            problems = [str(error)]
    return shape, None if problems else Record(where, fields, tools), problems


def _no_shape(given: Sequence[str], shapes: Sequence[Shape]) -> str:
    known = {name for shape in shapes for name in shape}
    near = ((name, nearest(name, known)) for name in given if name not in known)
    meant = next((f": unknown field {name!r}; did you mean {match!r}?" for name, match in near if match), "")
    return f"needs the fields {'; or '.join(map(_names, shapes))}; and has {_names(given) or 'none'}{meant}"


def _names(fields: Sequence[str]) -> str:
    return ", ".join(fields)


def _read_field(name: str, value: Any) -> tuple[Any, list[str]]:
    """A field's text, or its messages in one form; and what is wrong with the field."""
    if isinstance(value, list) and name != "instruction":
        messages: list[dict[str, Any]] = []
        problems: list[str] = []
        for number, message in enumerate(value):
            try:
                messages.append(_read_message(message))
            except ValueError as error:
                problems.append(f"{name}[{number}]{error}")
        return messages, problems
    if not isinstance(value, str):
        allowed = "text" if name == "instruction" else "text, or a list of messages"
        return value, [f"{name}: is {kind_in_json(value)}; allowed: {allowed}"]
    if name in ("messages", "conversations"):
        return value, [f"{name}: is text; allowed: a list of messages"]
    return value, []


def _read_message(message: Any) -> dict[str, Any]:
    """A message with a role and a content that is text, without fields that are null.

    Raises `ValueError` for anything else; its text begins with the place in the message.
    """
    if not isinstance(message, dict):
        raise ValueError(": is not a message with a role and a content")
    share_gpt = "role" not in message and "from" in message
    role, content = ("from", "value") if share_gpt else ("role", "content")
    who, text = message.get(role), message.get(content)
    if not isinstance(who, str):
        raise ValueError(": is not a message with a role and a content")
    if share_gpt:
        who = SHARE_GPT_ROLES.get(who, who)
    if who not in ROLES:
        allowed = (*SHARE_GPT_ROLES, *ROLES) if share_gpt else ROLES
        raise ValueError(f".{role}: {Problem.unknown('', who, 'role', allowed)}")
    if isinstance(text, list):
        text = _joined(text, f".{content}")
    calls = message.get("tool_calls")
    if not isinstance(text, str) and not (calls and text is None):
        raise ValueError(f".{content}: is {kind_in_json(text)}; allowed: text, or a list of text parts")
    if who == "assistant" and not text and not calls:
        raise ValueError(f".{content}: is empty")
    if message.get("weight") not in (None, 0, 1):
        raise ValueError(f".weight: is {message['weight']!r}; allowed: 0, which is not learned, or 1")
    read: dict[str, Any] = {}
    for name, value in message.items():  # in their order, which a template may write
        if name in (role, content):
            read["role" if name == role else "content"] = who if name == role else text
        elif value is not None:
            read[name] = value
    return read


def _joined(parts: list[Any], place: str) -> str:
    """The text of a content that is a list of parts."""
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'{place}[{number}]: is {kind!r}; allowed: {{"type": "text", "text": ...}}')
    return "".join(part["text"] for part in parts)


def _in_one_form(shape: Shape, fields: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `Record`; raises `ValueError` for fields that do not fit together."""
    if "instruction" in shape:
        if any(isinstance(text, list) for text in fields.values()):
            raise ValueError("instruction, input, output: all must be text")
        asked = "\n".join(text for text in (fields["instruction"], fields.get("input")) if text)
        _refuse_empty({"output": fields["output"]})
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]}
    if "chosen" in shape:
        fields = _pair(fields, given)
    _refuse_empty({name: value for name, value in fields.items() if name not in _QUESTIONS})
    if len({isinstance(value, list) for value in fields.values()}) > 1:
        raise ValueError(f"{_names(list(fields))}: either all are text or all are lists of messages")
    if len(fields) == 1:
        return {"messages": next(iter(fields.values()))}
    return fields if "chosen" in fields else dict(zip(("prompt", "completion"), fields.values(), strict=True))


def _refuse_columns(given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for columns that would change what is learned, and are not read."""
    mask = given.get("mask")
    if "instruction" in given and given.get("history"):
        raise ValueError("history: is not read; write all turns as messages")
    if "conversations" in given and isinstance(mask, str) and SHARE_GPT_ROLES.get(mask, mask) != "user":
        raise ValueError(f"mask: is {mask!r}; allowed: User, because only answers are learned")


def _with_system(fields: dict[str, Any], system: Any) -> dict[str, Any]:
    """The values of a `Record`, of which the text in the column `system` is the first message, if there is any.

    Raises `ValueError` if it is not a text, or has no place in them.
    """
    if not system:
        return fields
    name, first = next(iter(fields.items()))
    if not isinstance(system, str):
        raise ValueError(f"system: is {kind_in_json(system)}; allowed: text")
    if isinstance(first, str):
        raise ValueError(f"system: has no place beside {name} that is text; write messages, or put it into {name}")
    if first and first[0]["role"] in ("system", "developer"):
        if first[0]["content"] == system:
            return fields
        raise ValueError(f"system: is another text than that of the {first[0]['role']} message; give one of them")
    return {**fields, name: [{"role": "system", "content": system}, *first]}


def _refuse_empty(answers: Mapping[str, Any]) -> None:
    for name, value in answers.items():
        if not value and isinstance(value, str):
            raise ValueError(f"{name}: is empty")
        if isinstance(value, list) and not any(is_learned(message) for message in value):
            raise ValueError(f"{name}: has no message of the assistant to learn")


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _pair(fields: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Two answers and their prompt, which may also be their common beginning, as in TRL."""
    prompt, chosen, rejected = fields.get("prompt"), fields["chosen"], fields["rejected"]
    if type(chosen) is not type(rejected) or (isinstance(prompt, list) and isinstance(chosen, str)):
        return fields
    if isinstance(prompt, list):
        size = len(prompt)
        if size and chosen[:size] == rejected[:size] == prompt:  # the conversations have the prompt in them
            return {"prompt": prompt, "chosen": chosen[size:], "rejected": rejected[size:]}
        return fields
    if isinstance(prompt, str) and isinstance(chosen, str):
        return fields
    asked = next((name for name in ("instruction", "question", "query", "input") if name in given), None)
    if prompt is None and asked:
        raise ValueError(f"has {_names(list(given))}: is {asked!r} the prompt? Name it 'prompt'")
    stem = chosen[: shared_length(chosen, rejected)]
    if isinstance(stem, str):  # up to the word in which they differ, because half a word has other tokens
        stem = (re.sub(r"\S+$", "", stem) or stem).rstrip(" ")
    if not stem and isinstance(prompt, str):
        return fields
    if not stem:
        raise ValueError("has no prompt, and chosen and rejected do not begin alike")
    return {"prompt": stem, "chosen": chosen[len(stem) :], "rejected": rejected[len(stem) :]}


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value:  # as tables have it, whose columns are of one type
        try:
            value = parse_json(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"tools: is text that is not valid JSON: column {error.colno}: {error.msg}") from None
        except ValueError as error:
            raise ValueError(f"tools: is text that cannot be read: {error}") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"tools: is {kind_in_json(value)}; allowed: a list of JSON schemas of functions")
    return value
