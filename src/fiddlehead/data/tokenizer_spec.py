"""What a `tokenizer.json` says: its vocabulary, its parts and what they do; Hugging Face tools read the same file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import parse_json
from fiddlehead.numbers import is_whole

END_OF_TEXT = "<|endoftext|>"
_MAX_IDS = 1 << 24
_MAX_GROWTH = 256


def parse_spec(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The parsed file, and the id of each token.

    Args:
        source: names the file in errors.

    Raises:
        ConfigError: the text is not that of a tokenizer.
    """
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


def fingerprint(spec: dict[str, Any], eos_id: int) -> str:
    """A short hash of what the tokenizer does."""
    # Truncation and padding are switched off when encoding, so they make no difference.
    does = {name: value for name, value in spec.items() if name not in ("version", "truncation", "padding")}
    return hashlib.sha256(json.dumps([does, eos_id], sort_keys=True).encode()).hexdigest()[:16]


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level vocabulary, as in GPT-2's."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def byte_level_spec() -> dict[str, Any]:
    """A `tokenizer.json` of the bytes alone: byte-level BPE without a merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": END_OF_TEXT, **plain, "special": True}],
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
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }


def token_measure(spec: dict[str, Any]) -> Callable[[str], int] | None:
    """A function that gives the UTF-8 bytes a vocabulary entry stands for, or None for a kind that does not say."""
    kinds = component_types(spec.get("decoder")) | component_types(spec.get("pre_tokenizer"))
    if "ByteLevel" in kinds:
        return len  # a character for each byte
    if "Metaspace" in kinds or "ByteFallback" in kinds:
        return _sentencepiece_bytes
    return None


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())


def component_types(component: Any) -> set[str]:
    """The types of a decoder or pre-tokenizer and of those in its sequence."""
    if not isinstance(component, dict):
        return set()
    kind, sequences = component.get("type"), (component.get("decoders"), component.get("pretokenizers"))
    parts = [part for sequence in sequences if isinstance(sequence, list) for part in sequence]
    own = {kind} if isinstance(kind, str) else set()
    return own.union(*map(component_types, parts))
