"""Values as they are typed in a shell: ``[1, 2]``, ``0.9,0.95``, ``{a: 1}``, ``"quoted"``, and bare words."""

from __future__ import annotations

import ast
from typing import Any

from fiddlehead.errors import ConfigError

_OPEN = {"[": "]", "(": ")", "{": "}"}
_WORDS = {"true": True, "false": False, "null": None}


class Bare(str):
    """A text without quotes: it may mean a number, a name or itself, as the type asks for."""

    __slots__ = ()


def typed(text: str) -> Bare | str:
    """`text` as a `Bare`, or what is inside if all of it is in quotes."""
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
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
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return str(given)


def is_bracketed(text: str) -> bool:
    """Whether `text` is written as a list, tuple or dict."""
    text = text.strip()
    return len(text) > 1 and text[0] in _OPEN and text[-1] == _OPEN[text[0]]


def parse_list(text: str) -> list[Any]:
    """The members of ``[a, b]``, ``(a, b)``, ``{a, b}`` or ``a,b``: `Bare`, str where quoted, or nested."""
    parsed = parse(text) if text.strip()[:1] in _OPEN else _Parser(text, "]").members("]")
    return [parsed] if isinstance(parsed, (dict, str)) else list(parsed)


def parse(text: str) -> Any:
    """The list, tuple, set, dict, quoted or bare text written in `text`; ConfigError if it is not well formed."""
    parser = _Parser(text.strip())
    value = parser.value("")
    parser.end()
    return value


def split_arguments(text: str) -> list[str]:
    """The arguments of a call, as they were typed: ``a=1, b=[2, 3]`` gives two."""
    parser = _Parser(text, "]")
    arguments = []
    while parser.peek() != "]" or parser.position < len(text):
        start = parser.position
        parser.skip_to(",]")
        arguments.append(text[start : parser.position].strip())
        if parser.position >= len(text):
            break
        parser.take(",")
    return arguments


class _Parser:
    """Recursive descent over one text, to which a closing bracket that was not typed may be added."""

    def __init__(self, typed: str, added: str = "") -> None:
        self.typed = typed
        self.text = typed + added
        self.position = 0

    def peek(self) -> str:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.text[self.position : self.position + 1]

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"{character!r} is missing")
        self.position += 1

    def end(self) -> None:
        if self.peek():
            raise self.error(f"{self.text[self.position :]!r} is too much")

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.typed!r} is not well formed: {problem}")

    def value(self, stop: str) -> Any:
        character = self.peek()
        if character == "[":
            self.position += 1
            return self.members("]")
        if character == "(":
            self.position += 1
            return tuple(self.members(")"))
        if character == "{":
            self.position += 1
            return self.braces()
        start = self.position
        self.skip_to(stop)
        text = self.text[start : self.position].strip()
        if not text:
            raise self.error("a value is missing")
        return typed(text)

    def members(self, close: str) -> list[Any]:
        members = []
        while self.peek() != close:
            members.append(self.value("," + close))
            if self.peek() != close:
                self.take(",")
        self.position += 1
        return members

    def braces(self) -> Any:
        """A dict, or a set where the first member is followed by no colon."""
        pairs: dict[Any, Any] = {}
        members: list[Any] = []
        while self.peek() != "}":
            key = self.value(",:}")
            if self.peek() == ":":
                self.position += 1
                if isinstance(key, (list, dict)) or key in pairs:
                    raise self.error(
                        f"{key!r} cannot be a key" if isinstance(key, (list, dict)) else f"two keys {key!r}"
                    )
                pairs[key] = self.value(",}")
            else:
                members.append(key)
            if self.peek() != "}":
                self.take(",")
        self.position += 1
        if pairs and members:
            raise self.error(f"{members[0]!r} has no value")
        return members if members else pairs

    def skip_to(self, stop: str) -> None:
        """Moves to the first of the characters `stop` that is in no quotes and no brackets."""
        closing: list[str] = []
        while self.position < len(self.text):
            character = self.text[self.position]
            if not closing and character in stop:
                return
            if character in "'\"":
                self.position = self.text.find(character, self.position + 1)
                if self.position < 0:
                    self.position = len(self.text)
                    raise self.error(f"the quote {character} is not closed")
            elif character in _OPEN:
                closing.append(_OPEN[character])
            elif closing and character == closing[-1]:
                closing.pop()
            self.position += 1
        if closing or stop:
            raise self.error(f"{(closing or [stop[-1]])[-1]!r} is missing")
