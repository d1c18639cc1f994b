"""A tokenizer given as a `tokenizer.json`, with the library that reads it; and its special tokens."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fiddlehead.data.pieces import PIECE, Cut, kinds, pieces
from fiddlehead.data.special_tokens import SpecialTokens
from fiddlehead.data.tokenizer_spec import END_OF_TEXT, component_types, fingerprint, parse_spec, token_measure
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path

if TYPE_CHECKING:
    import tokenizers

_TRIAL = ("a", "Two words, 1!\n\u00e9\u4e2d", "a" * 40 + "!")
"""Texts that a tokenizer is tried with before it is used."""

# Special tokens that end a document where no file names one, the most specific first: a chat model's file has several,
# and the end of a turn (<|im_end|>) is the end of a document only where nothing better exists.
_EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>", "<|eot_id|>")


class JSONTokenizer:
    """A tokenizer given as the text of a `tokenizer.json`.

    The token that ends a document is the first of these that there is:

    1. `eos`, a token or its id
    2. the `eos_token` of tokenizer_config.json or special_tokens_map.json
    3. the first id in `eos_token_id` of config.json, then of generation_config.json, that is a special token
    4. the first of the usual names that is a special token

    `special` is what the files beside it say. Raises `ConfigError` for text that is not a tokenizer, for an end that is
    not one of its tokens, and, with the candidates, when there is none.
    """

    def __init__(
        self,
        text: str,
        *,
        eos: str | int | None = None,
        special: SpecialTokens | None = None,
        source: str = "tokenizer.json",
    ) -> None:
        self._text = text
        self._source = source
        self._spec, self._ids = parse_spec(text, source)
        self.special = special or SpecialTokens()
        """The special tokens that the files beside it name."""
        self.vocab_size: int = max(self._ids.values()) + 1
        self.eos_id: int = self._find_eos(eos)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._spec, self.eos_id)

    @property
    def begin_ids(self) -> list[int]:
        return self._begin_ids

    @property
    def eos_token(self) -> str:
        """The text of the token that ends a document."""
        return self.token(self.eos_id)

    @property
    def stop_ids(self) -> list[int]:
        """The tokens at which a model stops to write; the first is `eos_id`.

        The others are the `eos_token` that is named, as the end of a turn often is, and `eos_token_id` of
        generation_config.json, or of config.json where that has none.
        """
        named = self._ids.get(self.special.names.get("eos_token", ""))
        ids = [self.eos_id, named, *(self.special.generation_eos_ids or self.special.config_eos_ids)]
        known = set(self._ids.values())
        return [i for i in dict.fromkeys(ids) if i in known]

    def ids_without_token(self, vocab_size: int) -> list[int]:
        """The ids of a model of `vocab_size` tokens that no token of the tokenizer has."""
        return sorted(set(range(vocab_size)).difference(self._ids.values()))

    def id_of(self, name: str) -> int | None:
        """The id of the token that has a name, such as `bos_token`; None if there is none."""
        return self._ids.get(self.special.names.get(name, ""))

    def token(self, number: int) -> str:
        """The text of the token that has this id.

        Raises:
            KeyError: none has.
        """
        for token, i in self._ids.items():
            if i == number:
                return token
        raise KeyError(number)

    def encode(self, text: str) -> list[int]:
        with self._faults():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids that a model is given to go on from `text`: with `begin_ids`, without spaces at the end.

        In most vocabularies a space belongs to the token after it: "def " and then " f" would be text that never was.
        Where there is no token, a document begins: after the end of another.
        """
        return [*self.begin_ids, *self.encode(text.rstrip(" "))] or [self.eos_id]

    def encode_with_special(self, text: str, *, complete: bool = False) -> list[int]:
        """The token ids of `text`, in which the names of special tokens are these tokens: of a chat's markup.

        Args:
            complete: with those, too, that the tokenizer puts around every text, such as one where it begins.
        """
        with self._faults():
            return self._with_special.encode(text, add_special_tokens=complete).ids

    def encode_batch_with_special(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_with_special` of each text."""
        with self._faults():
            return [encoding.ids for encoding in self._with_special.encode_batch_fast(texts, add_special_tokens=False)]

    def added_tokens(self) -> list[tokenizers.AddedToken]:
        """The tokens, special ones and others, that are found in a chat's text before the rest of it is tokenized."""
        return list(self._with_special.get_added_tokens_decoder().values())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with self._faults():
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def pieces(self, text: str) -> Iterator[str]:
        if len(text) <= PIECE:  # most are: the vocabulary need not be looked through
            return iter([text])
        return pieces(text, self._cuts, self.encode)

    @cached_property
    def _cuts(self) -> list[Cut]:
        return kinds(self._ids, component_types(self._spec.get("pre_tokenizer")))

    def decode(self, ids: Sequence[int]) -> str:
        with self._faults():
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray | None:
        measure = token_measure(self._spec)
        if measure is None:
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._ids.items():
            lengths[i] = measure(token)
        for token in self._spec.get("added_tokens") or []:  # added tokens are plain text in every kind of vocabulary
            lengths[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
        lengths[[self.eos_id, *(self._ids[token] for token in self._promoted)]] = 0
        return lengths

    def save(self, path: str | Path) -> None:
        user_path(path).write_text(self._text, encoding="utf-8")

    def beside(self, folder: Path) -> JSONTokenizer:
        """The same tokenizer with the special tokens that the files in `folder` name."""
        return JSONTokenizer(self._text, special=SpecialTokens.read(folder), source=self._source)

    @cached_property
    def _begin_ids(self) -> list[int]:
        # Of the file's post-processor, as transformers 5 has it: what tokenizer_config.json says of it does not count.
        with self._faults():
            encoding = self._tokenizer.encode("a")
        added = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        return [token for token, _ in added]

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = self._load()
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not the end of it
        return tokenizer

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return self._load()

    def _load(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer

        with self._faults(), _quiet():
            tokenizer = Tokenizer.from_str(self._text)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            for text in _TRIAL:
                with contextlib.suppress(
                    Exception
                ):  # such as a character that it does not know; a panic is not an Exception
                    tokenizer.decode(tokenizer.encode(text).ids)
        if self._promoted:
            tokenizer.add_special_tokens(self._promoted)
        return tokenizer

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Turns the library's errors with the file, plain Exceptions and panics, into ConfigErrors."""
        try:
            yield
        except ConfigError:
            raise
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise ConfigError(Problem.in_file(self._source, f"is not a tokenizer: {error}")) from error

    @property
    def _added(self) -> list[dict[str, Any]]:
        return self._spec.get("added_tokens") or []

    @cached_property
    def _promoted(self) -> list[str]:
        """Tokens of the vocabulary that only the neighbouring files call special."""
        added = {token["content"] for token in self._added}
        return sorted(token for token in self.special.special if token in self._ids and token not in added)

    @property
    def _special_ids(self) -> dict[str, int]:
        """The id of each special token."""
        special = [token["content"] for token in self._added if token.get("special")]
        return {token: self._ids[token] for token in (*special, *self._promoted)}

    def _find_eos(self, eos: str | int | None) -> int:
        ids, special, source = self._ids, self._special_ids, self._source
        if isinstance(eos, int):
            if eos not in ids.values():
                raise ConfigError(Problem("eos", eos, f"is not a token of {source}", (f"0 to {max(ids.values())}",)))
            return eos
        if eos is not None:
            if eos not in ids:
                added = [token["content"] for token in self._added]
                raise ConfigError(Problem("eos", eos, f"is not a token of {source}", added))
            return ids[eos]
        if named := self.special.names.get("eos_token"):
            if named not in ids:
                message = f"eos_token={named!r} is not a token of {source}; name another with eos=..."
                raise ConfigError(Problem.in_file(self.special.source, message))
            return ids[named]
        numbers = set(special.values())
        listed = (*self.special.config_eos_ids, *self.special.generation_eos_ids)
        usual = (special[name] for name in _EOS_NAMES if name in special)
        found = next((number for number in (*listed, *usual) if number in numbers), None)
        if found is not None:
            return found
        ordinary = ", ".join(repr(name) for name in _EOS_NAMES if name in ids)
        candidates = ", ".join(map(repr, [*special][:20])) or "none, it has no special tokens"
        message = (
            f"no special token of {source} has a usual name for the end of a document; name one with eos=..., or as "
            f"eos_token in tokenizer_config.json; candidates: {candidates}"
        )
        raise ConfigError(Problem("eos", None, message + (f"; not special: {ordinary}" if ordinary else "")))

    def __getstate__(self) -> dict[str, Any]:
        # The library's object is rebuilt where it is needed.
        return {name: value for name, value in self.__dict__.items() if name not in ("_tokenizer", "_with_special")}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the report that a panic of the library writes to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123  a descriptor is wanted
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
