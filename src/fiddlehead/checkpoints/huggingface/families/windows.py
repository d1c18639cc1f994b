"""Sliding windows in `config.json`: one size, of all layers or of those that `layer_types` lists."""

from __future__ import annotations

from collections.abc import Callable

from fiddlehead.checkpoints.huggingface.families.defaults import Fields
from fiddlehead.checkpoints.huggingface.families.rotary import KINDS_OF_LAYER, read_rope, write_rope
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig


def read_window(settings: Fields) -> Fields:
    return read_rope(settings) | {"window_size": window_size(settings)}


def window_size(settings: Fields) -> tuple[int, int] | None:
    window = settings["sliding_window"]
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ConfigError(Problem("sliding_window", window, "must be a whole number of 1 or more, or null"))
    return None if window is None else (window - 1, 0)


def write_window(config: TransformerConfig) -> Fields:
    return write_rope(config) | {"sliding_window": sliding_window(config)}


def sliding_window(config: TransformerConfig) -> int | None:
    return None if config.window_size is None else config.window_size[0] + 1


def layer_types(config: TransformerConfig) -> list[str]:
    windows = (config.window(layer) for layer in range(config.num_layers))
    return ["full_attention" if window == (-1, -1) else "sliding_attention" for window in windows]


def read_layer_types(settings: Fields, types: list[str] | None) -> Fields:
    """The window, and which layers have it: as a number where it is every N-th layer that has none."""
    if types is not None and (other := sorted({str(kind) for kind in types} - set(KINDS_OF_LAYER))):
        raise ConfigError(Problem("layer_types", message=f"has {', '.join(other)}", allowed=KINDS_OF_LAYER))
    if types is not None and len(types) != settings["num_hidden_layers"]:
        message = f"has {len(types)} names; num_hidden_layers={settings['num_hidden_layers']!r}"
        raise ConfigError(Problem("layer_types", message=message))
    fields: Fields = {"window_size": window_size(settings)}
    if fields["window_size"] is None or types is None or "sliding_attention" not in types:
        return {"window_size": None}
    marks = tuple(int(kind == "sliding_attention") for kind in types)
    for every in (2, 3, 4, 5, 6, 7, 8):
        if marks == tuple(int((layer + 1) % every != 0) for layer in range(len(marks))):
            return fields | {"window_attn_skip_freq": every}
    return fields | {"window_attn_skip_freq": None if all(marks) else marks}


def types_of_layers(settings: Fields, has_window: Callable[[int], bool]) -> list[str]:
    return [KINDS_OF_LAYER[has_window(layer)] for layer in range(settings["num_hidden_layers"])]
