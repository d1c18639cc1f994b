"""Reads the special tokens of a folder's tokenizer as transformers 5 reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import read_object

NAMES_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""They name special tokens by their text."""
COMPANIONS = (*NAMES_FILES, "chat_template.jinja")
"""The files that belong beside a `tokenizer.json`: they name special tokens, or have the chat template."""
IDS_FILES = ("config.json", "generation_config.json")
"""They name special tokens by their ids. An imported checkpoint has them in its folder `huggingface`."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens in the files beside a `tokenizer.json`."""

    names: Mapping[str, str] = field(default_factory=dict)
    """The text of each named token, such as `bos_token`, for chat templates."""
    special: frozenset[str] = frozenset()
    """All special tokens."""
    config_eos_ids: tuple[int, ...] = ()
    """`eos_token_id` of config.json."""
    generation_eos_ids: tuple[int, ...] = ()
    """`eos_token_id` of generation_config.json."""
    source: str = "the files beside it"

    @classmethod
    def read(cls, folder: Path) -> SpecialTokens:
        """Reads the files in `folder`; all of them are optional.

        special_tokens_map.json counts only where tokenizer_config.json has no `added_tokens_decoder`, and then more
        than tokenizer_config.json.

        Raises:
            ConfigError: a file cannot be read, or a special token in it is neither text nor an id.
        """
        files = {name: read_settings(folder / name) for name in NAMES_FILES}
        settings, legacy = files.values()
        added = settings.get("added_tokens_decoder")
        merged = settings if added is not None else settings | legacy
        source = next((str(folder / name) for name in reversed(NAMES_FILES) if files[name]), str(folder))
        names = dict(_names(merged, source))
        listed = [merged.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
        special = {_text(token) for tokens in listed if isinstance(tokens, list) for token in tokens}
        if isinstance(added, dict):
            special |= {_text(token) for token in added.values() if isinstance(token, dict) and token.get("special")}
        config, generation = (_eos_ids(folder, name) for name in IDS_FILES)
        return cls(names, frozenset([*names.values(), *filter(None, special)]), config, generation, source)


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a JSON file; none if there is no such file.

    Raises:
        ConfigError: it cannot be read, or is not an object.
    """
    return read_object(file) if file.is_file() else {}


def update_settings(file: Path, **settings: Any) -> None:
    """Changes settings in a JSON file, which is made if there is none."""
    text = json.dumps(read_settings(file) | settings, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _names(settings: Mapping[str, Any], source: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each token that has a name."""
    extra = settings.get("extra_special_tokens")
    for name, value in {**settings, **(extra if isinstance(extra, dict) else {})}.items():
        if not name.endswith("_token") or value is None or isinstance(value, bool):  # add_bos_token is a switch
            continue
        text = _text(value)
        if text is None:
            raise ConfigError(
                Problem.in_file(source, f"{name}={value!r}: must be the text of a token, or an object with `content`")
            )
        yield name, text


def _text(token: Any) -> str | None:
    """The text of a token, which is given as it is or in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _eos_ids(folder: Path, name: str) -> tuple[int, ...]:
    """`eos_token_id` of a file in `folder` or in its folder `huggingface`; several where it is a list."""
    for file in (folder / name, folder / "huggingface" / name):
        settings = read_settings(file)
        text_model = settings.get("text_config")  # the language model's part of one that also sees images
        for each in (settings, text_model if isinstance(text_model, dict) else {}):
            value = each.get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise ConfigError(
                    Problem.in_file(file, f"eos_token_id={value!r}: must be the id of a token, or a list of ids")
                )
            return tuple(ids)
    return ()
