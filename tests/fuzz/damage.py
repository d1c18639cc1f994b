"""Ways to damage a valid file, as Hypothesis draws and shrinks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.readers import Reader

Draw = Callable[[st.SearchStrategy[Any]], Any]


def nested(depth: int, value: Any = None) -> Any:
    """A list in a list in a list."""
    for _ in range(depth):
        value = [value]
    return value


class Raw:
    """JSON text that Python would not write."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:  # also a test's name, which all test processes must give it
        return f"Raw({self.text[:20]!r})"


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -2.5, 1e9, 10**6, 10**9, 10**18, 10**30, -(10**9), 1e308, -0.0),
    *(float("nan"), float("inf"), "", "a", "0", "../../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "\n"),
    *([], {}, [0], [-1], [1.5], ["a"], [None], {"a": 1}, {"a": {}}, [[]], [{}], nested(50), [1] * 3000),
    *(Raw("1" * 5000), Raw("-" + "1" * 5000), Raw("1e999"), Raw("[" * 5000), Raw("[" * 900 + "]" * 900)),
    *(Raw('{"a":' * 900 + "1" + "}" * 900), Raw("01"), Raw("nul"), Raw("'a'"), Raw('"\\x"'), Raw('"\t"')),
]
TEXTS = [
    *("[" * 3000, "(" * 3000, "{" * 3000, "1" * 5000, "\0"),
    *("'", '"', "=", "==", "[", "]", "{{", "}}", "{%", "%}", ",", ":", "-", "&a", "*a", "<<", "!ref", "!tuple", "? "),
    *("\n", "\t", "  ", "None", "null", "nan", "1e999", "-1", "0", "@", "@/etc/passwd", "@.", "x" * 5000, "\u2028"),
    *("!dtype x", "!device cuda:9", "!enum a:B.C", "!path ", "!set [[1]]", "!partial {}", "torch:Tensor", "os:system"),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value in a JSON value is."""
    yield path
    if isinstance(value, dict):
        for key, item in list(value.items())[:40]:
            yield from paths(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:20]):
            yield from paths(item, (*path, index))


def write(value: Any) -> str:
    """JSON, with `Raw` as it is."""
    raws: list[str] = []

    def default(raw: Raw) -> str:
        raws.append(raw.text)
        return f"@@{len(raws) - 1}@@"

    text = json.dumps(value, default=default)
    for number, raw in enumerate(raws):
        text = text.replace(f'"@@{number}@@"', raw)
    return text


def with_junk(draw: Draw, value: Any) -> Any:
    """A JSON value in which one is replaced, left out, added or doubled."""
    path = draw(st.sampled_from(list(paths(value))))
    if not path:
        return draw(st.sampled_from(JUNK))
    value = json.loads(json.dumps(value))
    at = value
    for key in path[:-1]:
        at = at[key]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if how == "remove":
        del at[path[-1]]
    elif how == "add" and isinstance(at, dict):
        at[draw(st.sampled_from(["a", "", "__class__", *map(str, at)]))] = draw(st.sampled_from(JUNK))
    else:
        at[path[-1]] = draw(st.sampled_from(JUNK))
    return value


def json_damage(draw: Draw, content: bytes) -> bytes:
    value = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        try:
            value = with_junk(draw, value)
        except TypeError:  # what has been replaced is not JSON any more
            break
    return write(value).encode()


def byte_damage(draw: Draw, content: bytes) -> bytes:
    at = draw(st.integers(0, max(0, len(content) - 1)))
    match draw(st.sampled_from(["cut", "flip", "flip", "insert", "double", "remove", "empty"])):
        case "cut":
            return content[:at]
        case "flip":
            data = bytearray(content)
            for _ in range(draw(st.integers(1, 4))):
                data[draw(st.integers(0, len(data) - 1))] = draw(st.sampled_from([0, 1, 10, 34, 91, 127, 128, 255]))
            return bytes(data)
        case "insert":
            return content[:at] + draw(st.binary(max_size=8)) + content[at:]
        case "double":
            return content[:at] + content[max(0, at - 64) :]
        case "remove":
            return content[:at] + content[at + draw(st.integers(1, 64)) :]
    return b""


def text_damage(draw: Draw, content: bytes) -> bytes:
    text = content.decode()
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(text)))
        end = draw(st.sampled_from([at, at + 1, at + 10, text.find("\n", at) % (len(text) + 1)]))
        text = text[:at] + draw(st.sampled_from(TEXTS)) + text[max(at, end) :]
    return text.encode()


def header_damage(draw: Draw, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json_damage(draw, content[8 : 8 + length])
    said = draw(st.sampled_from([len(header)] * 8 + [0, len(header) - 1, len(header) + 1, 2**40, 2**64 - 1]))
    return said.to_bytes(8, "little") + header + content[8 + length :]


def line_damage(draw: Draw, content: bytes) -> bytes:
    lines = content.splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = json_damage(draw, lines[number])
    return b"\n".join(lines)


_OF_KIND = {"json": json_damage, "lines": line_damage, "header": header_damage, "text": text_damage}


def damaged(draw: Draw, reader: Reader, content: bytes) -> bytes:
    """The content, damaged as the reader's kind of file can be."""
    own = _OF_KIND.get(reader.kind)
    if own and draw(st.sampled_from([True, True, True, False])):
        return own(draw, content)
    return byte_damage(draw, content)
