"""Text to token ids and back. All tokenizers save to one format, the `tokenizer.json` that Hugging Face tools read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fiddlehead.data.pieces import PIECE, Cut, kinds, pieces
from fiddlehead.data.special_tokens import COMPANIONS, NAMES_FILES, SpecialTokens, update_settings
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import parse_json, read_text
from fiddlehead.files.paths import user_path
from fiddlehead.numbers import is_whole

if TYPE_CHECKING:
    import tokenizers

_MAX_BYTES = 1 << 26
"""The largest size of a file; files with 262,144 tokens have half of it."""
_MAX_IDS = 1 << 24
_MAX_GROWTH = 256
_TRIAL = ("a", "Two words, 1!\n\u00e9\u4e2d", "a" * 40 + "!")
"""Texts that a tokenizer is tried with before it is used."""
END_OF_TEXT = "<|endoftext|>"

# Special tokens that end a document where no file names one, the most specific first: a chat model's file has several,
# and the end of a turn (<|im_end|>) is the end of a document only where nothing better exists.
_EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>", "<|eot_id|>")


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        ...

    @property
    def begin_ids(self) -> list[int]:
        """The tokens before every document and every prompt, such as Llama's <|begin_of_text|>; often none."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short hash of what the tokenizer does: equal fingerprints mean equal tokens for every text."""
        ...

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without special tokens; the name of a special token in the text is plain text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def pieces(self, text: str) -> Iterator[str]:
        """Pieces of a long text that have the tokens of the whole; raises `ConfigError` where it cannot be cut."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each token stands for, (vocab_size,) int32, 0 for special tokens; None where unknown."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes the file `path` in the format of `tokenizer.json`."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, each its own id, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256

    @property
    def begin_ids(self) -> list[int]:
        return []

    @property
    def fingerprint(self) -> str:
        return _fingerprint(_byte_level_spec(), self.eos_id)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def pieces(self, text: str) -> Iterator[str]:
        return (text[start : start + PIECE] for start in range(0, len(text), PIECE))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < self.eos_id).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, dtype=np.int32)
        lengths[self.eos_id] = 0
        return lengths

    def save(self, path: str | Path) -> None:
        user_path(path).write_text(json.dumps(_byte_level_spec(), ensure_ascii=False), encoding="utf-8")


class BPETokenizer:
    """A byte-level BPE tokenizer that is still to be trained, on the corpus of its data.

    Of its `vocab_size` tokens, 256 are the bytes and one ends a document; the rest are learned.
    """

    def __init__(self, vocab_size: int = 1024) -> None:
        if not (is_whole(vocab_size) and vocab_size >= 257):
            raise ConfigError(Problem("vocab_size", vocab_size, "must be 257 (256 bytes and one special) or more"))
        self.vocab_size = vocab_size

    @property
    def fingerprint(self) -> str:
        """A short hash of how it would be trained."""
        return hashlib.sha256(f"byte-level bpe {self.vocab_size}".encode()).hexdigest()[:16]

    def train(self, texts: Iterable[str]) -> JSONTokenizer:
        """The tokenizer learned from `texts`.

        Raises `ConfigError` when the texts have too few different pairs for `vocab_size` tokens.
        """
        import tokenizers

        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        splitter = model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=_byte_characters(),
        )

        def words(text: str) -> list[str]:
            return [word for word, _ in splitter.pre_tokenize_str(text)]  # not by way of the model, which is locked

        cuts = kinds((), ["ByteLevel"])
        model.train_from_iterator((piece for text in texts for piece in pieces(text, cuts, words)), trainer)
        if model.get_vocab_size() < self.vocab_size:
            message = f"needs more text to learn from; these documents give at most {model.get_vocab_size()} tokens"
            raise ConfigError(Problem("vocab_size", self.vocab_size, message))
        return JSONTokenizer(model.to_str(), eos=END_OF_TEXT)


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
        self._spec, self._ids = _parse(text, source)
        self.special = special or SpecialTokens()
        """The special tokens that the files beside it name."""
        self.vocab_size: int = max(self._ids.values()) + 1
        self.eos_id: int = self._find_eos(eos)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._spec, self.eos_id)

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
        return kinds(self._ids, _component_types(self._spec.get("pre_tokenizer")))

    def decode(self, ids: Sequence[int]) -> str:
        with self._faults():
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray | None:
        measure = _token_measure(self._spec)
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


class TokenizerFile(JSONTokenizer):
    """The tokenizer in a `tokenizer.json`, or in a folder that holds one.

    `path` is the file or the folder. `eos` is the token that ends a document. None takes the one that the neighbouring
    files name, or else the first of the usual names that is a special token (see `JSONTokenizer`). Raises `ConfigError`
    for a file that is missing or broken, and if no end-of-document token is found.
    """

    def __init__(self, path: str | Path, eos: str | int | None = None) -> None:
        self.path = user_path(path)
        file = self.path / "tokenizer.json" if self.path.is_dir() else self.path
        try:
            text = read_text(file, _MAX_BYTES)
        except FileNotFoundError:
            raise ConfigError(Problem("path", path, f"is not a tokenizer: there is no file {file}")) from None
        except (OSError, ValueError) as error:
            raise ConfigError(Problem("path", path, f"cannot be read: {error}")) from error
        super().__init__(text, eos=eos, special=SpecialTokens.read(file.parent), source=str(file))

    @property
    def companions(self) -> list[Path]:
        """The files beside it that name its special tokens and say how a chat is written."""
        folder = self.path if self.path.is_dir() else self.path.parent
        files = (folder / name for name in COMPANIONS)
        return [file for file in files if file.is_file()]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` to `folder`, with the files that accompany `tokenizer`.

    `TokenizerFile(folder)` then has the same special tokens, the same end of a document and the same `stop_ids`.
    """
    tokenizer.save(folder / "tokenizer.json")
    for file in getattr(tokenizer, "companions", ()):
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
    if not isinstance(tokenizer, JSONTokenizer):
        return
    try:
        found = tokenizer.beside(folder).eos_id
    except ConfigError:  # only `eos` says which one it is
        found = None
    if found != tokenizer.eos_id:
        for file in (folder / name for name in NAMES_FILES):
            if file.name == NAMES_FILES[0] or file.is_file():
                update_settings(file, eos_token=tokenizer.eos_token)
    if tokenizer.beside(folder).stop_ids != tokenizer.stop_ids:
        update_settings(folder / "generation_config.json", eos_token_id=tokenizer.stop_ids)


def refuse_missing_rows(tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises `ConfigError`, naming each, if tokens have no row in the embedding of a model of `vocab_size` tokens."""
    if beyond := sorted({int(i) for i in ids if i >= vocab_size}):
        raise ConfigError(*(Problem.in_file(where, f"has {no_row(tokenizer, i, vocab_size)}") for i in beyond))


def no_row(tokenizer: Tokenizer, number: int, vocab_size: int) -> str:
    """A phrase that names a token without a row in the embedding of a model of `vocab_size` tokens."""
    try:
        text = f" {tokenizer.token(number)!r}" if isinstance(tokenizer, JSONTokenizer) else ""
    except KeyError:  # a dataset that was not made with its tokenizer
        text = ""
    return f"the token{text} ({number}), and the model has vocab_size={vocab_size}: ids from 0 to {vocab_size - 1}"


def _parse(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The parsed file, and the id of each token."""
    try:
        spec = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            Problem.in_file(source, f"is broken JSON: line {error.lineno}, column {error.colno}: {error.msg}")
        ) from error
    except ValueError as error:
        raise ConfigError(Problem.in_file(source, f"cannot be read: {error}")) from error
    try:
        vocab = spec["model"]["vocab"]
        # Unigram models list [token, score] pairs, all others map a token to its id.
        ids = {pair[0]: i for i, pair in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        added = spec.get("added_tokens") or []
        ids.update((token["content"], token["id"]) for token in added)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ConfigError(
            Problem.in_file(source, "is not a valid tokenizer.json: it has no model with a vocabulary")
        ) from error
    if not isinstance(added, list) or not ids or not all(isinstance(token, str) for token in ids):
        message = "is not a valid tokenizer.json: its vocabulary is empty or has tokens that are not texts"
        raise ConfigError(Problem.in_file(source, message))
    if wrong := [i for i in ids.values() if not (is_whole(i) and 0 <= i < _MAX_IDS)]:
        message = f"is not a valid tokenizer.json: its vocabulary has the id {wrong[0]!r}; allowed: 0 to {_MAX_IDS - 1}"
        raise ConfigError(Problem.in_file(source, message))
    if (growth := _growth(spec.get("normalizer"))) > _MAX_GROWTH:
        message = f"its normalizer makes a text up to {growth:.0f} times as long; allowed: {_MAX_GROWTH}"
        raise ConfigError(Problem.in_file(source, message))
    return spec, ids


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


def _growth(normalizer: Any) -> float:
    """The factor by which a tokenizer's normalizer can lengthen a text."""
    if not isinstance(normalizer, dict):
        return 1.0
    parts = normalizer.get("normalizers")
    if isinstance(parts, list):
        return math.prod(map(_growth, parts))
    content, pattern = normalizer.get("content"), normalizer.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(content, str):
        return 1.0
    return max(1.0, len(content.encode()) / max(1, len(str(replaced or "").encode())))


def _fingerprint(spec: dict[str, Any], eos_id: int) -> str:
    # Truncation and padding are switched off when encoding, so they make no difference.
    does = {name: value for name, value in spec.items() if name not in ("version", "truncation", "padding")}
    return hashlib.sha256(json.dumps([does, eos_id], sort_keys=True).encode()).hexdigest()[:16]


def _byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level vocabulary, as in GPT-2's."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def _byte_level_spec() -> dict[str, Any]:
    """A `tokenizer.json` of the bytes alone: byte-level BPE without a merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ByteTokenizer.eos_id, "content": END_OF_TEXT, **plain, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _token_measure(spec: dict[str, Any]) -> Any:
    """A function that gives the UTF-8 bytes a vocabulary entry stands for, or None for a kind that does not say."""
    kinds = _component_types(spec.get("decoder")) | _component_types(spec.get("pre_tokenizer"))
    if "ByteLevel" in kinds:
        return len  # a character for each byte
    if "Metaspace" in kinds or "ByteFallback" in kinds:
        return _sentencepiece_bytes
    return None


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())


def _component_types(component: Any) -> set[str]:
    """The types of a decoder or pre-tokenizer and of those in its sequence."""
    if not isinstance(component, dict):
        return set()
    kind, sequences = component.get("type"), (component.get("decoders"), component.get("pretokenizers"))
    parts = [part for sequence in sequences if isinstance(sequence, list) for part in sequence]
    own = {kind} if isinstance(kind, str) else set()
    return own.union(*map(_component_types, parts))
