"""The arguments of `generate` and `chat`, which are checked before any model is read."""

from __future__ import annotations

import ast

import pytest

from fiddlehead.cli import use
from fiddlehead.errors import ConfigError


@pytest.mark.parametrize(
    "stop",
    [
        r"\n\n",
        r"ä\n",
        r"日本\t語",
        r"\x41\u00e9\U0001F600",
        r"a\\n",
        r"\101",
        r"\N{LATIN SMALL LETTER A WITH DIAERESIS}!",
    ],
)
def test_an_escape_in_a_stop_is_what_it_is_in_python(stop: str) -> None:
    assert use._unescaped(stop) == ast.literal_eval(f'"{stop}"')


@pytest.mark.parametrize("stop", ["ä", "\\end", "\\d+", "C:\\", "a\\ b", "\n"])
def test_what_is_not_an_escape_is_left_as_it_is(stop: str) -> None:
    assert use._unescaped(stop) == stop


@pytest.mark.parametrize("stop", [r"\x4", r"\xZZ", r"\u12", r"\N{NO SUCH}", r"\N", r"\ud800", "\udcff", ""])
def test_a_stop_that_cannot_come_is_refused(stop: str) -> None:
    with pytest.raises(ConfigError, match="--stop"):
        use._unescaped(stop)


def test_a_prompt_of_other_bytes_than_utf_8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--prompt 'a\\udcff': is not valid UTF-8 at character 1"):
        use._typed("a\udcff")
    assert use._typed("日本") == "日本"
