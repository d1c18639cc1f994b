"""Values as they are typed in a shell: ``[1, 2]``, ``0.9,0.95``, ``{a: 1}``, ``"quoted"``, and bare words."""

from __future__ import annotations

import ast
from typing import Any

from fiddlehead.errors import ConfigError

_OPEN = {"[": "]", "(": ")", "{": "}"}
_WORDS = {"true": True, "false": False, "null": None}
_NOT_A_LITERAL = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)


class Bare(str):
    """A text without quotes: the expected type decides whether it is a number, a name or a text."""

    __slots__ = ()


def typed(text: str) -> Bare | str:
    """`text` as a `Bare`, or what is inside if all of it is in quotes."""
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        try:
            value = ast.literal_eval(text)
        except _NOT_A_LITERAL:
            return Bare(text)
        if isinstance(value, str):
            return value
    return Bare(text)


def literal(given: Any) -> Any:
    """The Python literal that `given` is (with YAML's true, false and null), or else its text."""
    if isinstance(given, (list, tuple)):
        return type(given)(literal(member) for member in given)
    if isinstance(given, dict):
        return {literal(key): literal(item) for key, item in given.items()}
    if not isinstance(given, Bare):
        return given
    if given in _WORDS:
        return _WORDS[given]
    if given.lower().lstrip("+-") in ("inf", "nan"):
        return float(given)
    try:
        return ast.literal_eval(given.strip())
    except _NOT_A_LITERAL:
        return str(given)


def is_bracketed(text: str) -> bool:
    """Whether `text` is written as a list, tuple or dict."""
    text = text.strip()
    return len(text) > 1 and text[0] in _OPEN and text[-1] == _OPEN[text[0]]


def parse(text: str) -> Any:
    """The list, tuple, set, dict, quoted or bare text written in `text`.

    Raises:
        ConfigError: it is not well formed.
    """
    text = text.strip()
    close = _OPEN.get(text[:1])
    if not text:
        raise ConfigError("a value is missing")
    if close is None:
        return typed(text)
    if not is_bracketed(text):
        raise _malformed(text, f"{close!r} is missing")
    members = _without_last(_split(text[1:-1], ",", close))
    if close == "}":
        return _braces(text, members)
    return [parse(member) for member in members] if close == "]" else tuple(parse(member) for member in members)


def parse_list(text: str) -> list[Any]:
    """The members of ``[a, b]``, ``(a, b)``, ``{a, b}`` or ``a,b``: `Bare`, str where quoted, or nested."""
    if text.strip()[:1] not in _OPEN:
        return [parse(member) for member in _without_last(_split(text, ","))]
    parsed = parse(text)
    return [parsed] if isinstance(parsed, dict) else list(parsed)


def split_arguments(text: str) -> list[str]:
    """The arguments of a call, as they were typed: ``a=1, b=[2, 3]`` gives two."""
    return [argument.strip() for argument in _without_last(_split(text, ","))]


def _braces(text: str, members: list[str]) -> Any:
    """A dict, or the members of a set if none of them has a colon."""
    pairs: dict[Any, Any] = {}
    for member in members:
        key, *value = _split(member, ":")
        name = parse(key)
        if not value:
            if pairs:
                raise _malformed(text, f"{name!r} has no value")
            continue
        if isinstance(name, (list, dict)):
            raise _malformed(text, f"{name!r} cannot be a key")
        if name in pairs:
            raise _malformed(text, f"two keys {name!r}")
        pairs[name] = parse(":".join(value))
    if pairs and len(pairs) < len(members):
        raise _malformed(text, "a key has no value")
    return pairs or [parse(member) for member in members] or {}


def _split(text: str, separator: str, close: str = "") -> list[str]:
    """`text` cut at each `separator` that is outside of quotes and brackets; `close` is the bracket that ends it."""
    pieces, start, position = [], 0, 0
    closing: list[str] = []
    while position < len(text):
        character = text[position]
        if character in "'\"":
            position = text.find(character, position + 1)
            if position < 0:
                raise _malformed(text, f"the quote {character} is not closed")
        elif character in _OPEN:
            closing.append(_OPEN[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif not closing and character == close:
            raise _malformed(text, f"{character!r} has no opening bracket")
        elif not closing and character == separator:
            pieces.append(text[start:position])
            start = position + 1
        position += 1
    if closing:
        raise _malformed(text, f"{closing[-1]!r} is missing")
    return [*pieces, text[start:]]


def _without_last(pieces: list[str]) -> list[str]:
    """The pieces without an empty last one: a comma may end a list."""
    return pieces if pieces[-1].strip() else pieces[:-1]


def _malformed(text: str, problem: str) -> ConfigError:
    return ConfigError(f"{text!r} is not well formed: {problem}")
