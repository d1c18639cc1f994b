"""The fields that a `config.json` leaves out.

Tools write a field only if it differs from its default. The defaults are those of transformers' configurations, and
they differ between families. A test compares them with transformers, which is not needed to read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fiddlehead.errors import Problem, refuse

Fields = dict[str, Any]

COMMON: Fields = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_parameters": None,
    "rope_scaling": None,
}
LLAMA_SIZES: Fields = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}

_NULL_IS_ABSENT = ("rope_parameters", "rope_scaling", "layer_types")


def completed(settings: Fields, defaults: Fields, nullable: Sequence[str]) -> Fields:
    """Adds to a `config.json` the fields that it leaves out.

    Args:
        nullable: fields that may be null although their default is not.

    Raises:
        ConfigError: a field must not be null and is, or has another type than its default.
    """
    absent = [name for name in _NULL_IS_ABSENT if settings.get(name) is None]
    settings = {name: value for name, value in settings.items() if name not in absent}
    problems = []
    for name in sorted(defaults.keys() & settings.keys()):
        value, default = settings[name], defaults[name]
        if value is None:
            if default is not None and name not in nullable:
                message = f"is null, and must have a value; left out, it is {default!r}"
                problems.append(Problem(name, message=message))
        elif wanted := _wanted(name, value, default):
            problems.append(Problem(name, value, f"must be {wanted}"))
    refuse(problems)
    return defaults | settings


def _wanted(name: str, value: Any, default: Any) -> str | None:
    """What the value of a field must be; None if it is right."""
    if name in ("rope_parameters", "rope_scaling"):
        return None if isinstance(value, dict) else "an object"
    if name == "layer_types":
        return None if isinstance(value, list) else "a list"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return "a whole number" if whole else "a number"
    return None
