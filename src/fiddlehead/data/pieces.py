"""Cuts a long text so that its pieces have the same tokens as the whole text.

A tokenizer needs more than a hundred bytes of memory for each byte of a text. A cut is safe where no token can reach
across it, which the vocabulary tells, and where nothing else that the tokenizer does looks across it, which is tried at
each cut on the text around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from fiddlehead.errors import ConfigError

PIECE = 1 << 17
"""Characters of a piece, about; a shorter text is not cut."""
LONGEST = 1 << 24
"""Characters that are tokenized at once where there is no safe cut."""
_AROUND, _TRIES = 256, 64

PRE_TOKENIZERS = frozenset(
    {"", "Sequence", "ByteLevel", "Metaspace", "Split", "Whitespace", "WhitespaceSplit", "Digits", "Punctuation"}
    | {"BertPreTokenizer", "CharDelimiterSplit"}
)
"""Those that look at the text near a place only, to split there or not."""


@dataclass(frozen=True)
class Cut:
    """A kind of place to cut at."""

    place: re.Pattern[str]
    across: re.Pattern[str]
    """What a token has that reaches across such a place."""
    left_out: int
    """Characters after the place that the next piece begins without."""


_SPACE, _SPACE_IN_TOKEN = re.compile(r"(?<=[A-Za-z0-9])(?= [A-Za-z])"), re.compile("[A-Za-z0-9][ \u0120\u2581]")
KINDS = (
    Cut(_SPACE, _SPACE_IN_TOKEN, 0),
    Cut(_SPACE, _SPACE_IN_TOKEN, 1),  # a tokenizer that puts a space in front of each text
    Cut(re.compile(r"(?<=\S\n)(?=\w)"), re.compile("[\n\u010a][^\\W\u010a\u010d\u0120\u0109]"), 0),
)
"""Before a word, and after a line; U+0120 and U+010A are the space and the line's end in byte-level vocabularies."""


def kinds(vocabulary: Collection[str], pre_tokenizers: Collection[str]) -> list[Cut]:
    """The kinds of places across which no token of the vocabulary reaches; none for pre-tokenizers that look far."""
    if not PRE_TOKENIZERS.issuperset(pre_tokenizers):
        return []
    return [kind for kind in KINDS if not any(map(kind.across.search, vocabulary))]


def pieces(text: str, cuts: Collection[Cut], encode: Callable[[str], list[Any]]) -> Iterator[str]:
    """The pieces of a text; their tokens, in order, are the tokens of the whole text.

    Raises:
        ConfigError: a part of more than `LONGEST` characters has no safe cut.
    """
    start = 0
    while len(text) - start > PIECE:
        found = _next_cut(text, start, cuts, encode)
        if found is None:
            if len(text) - start > LONGEST:
                raise ConfigError(
                    f"a document of {len(text):,} characters has no place from {start + PIECE:,} to "
                    f"{start + LONGEST:,} where it can be cut without a change of its tokens; split it"
                )
            break
        end, following = found
        yield text[start:end]
        start = following
    yield text[start:]


def _next_cut(
    text: str, start: int, cuts: Collection[Cut], encode: Callable[[str], list[Any]]
) -> tuple[int, int] | None:
    """The end of a piece that begins at `start`, and the start of the next one."""
    for cut in cuts:
        tries = 0
        for match in cut.place.finditer(text, start + PIECE, min(len(text), start + LONGEST)):
            end = match.start()
            left, right = text[max(start, end - _AROUND) : end], text[end : end + _AROUND]
            if encode(left + right) == encode(left) + encode(right[cut.left_out :]):
                return end, end + cut.left_out
            if (tries := tries + 1) == _TRIES:
                break
    return None
