"""The part of its peak that a card reaches in each kind of work: an H100's, or what was measured on a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from fiddlehead.files import kept
from fiddlehead.files.paths import cache_folder
from fiddlehead.numbers import is_number
from fiddlehead.plan.cards import Card

REACHED: Mapping[str, float] = {
    "products": 0.73,
    "odd vocabulary": 0.11,  # of the head's products, where the vocabulary is not a multiple of 8
    "fp8": 1.1,  # of the bfloat16 peak
    "attention, forward": 0.48,
    "attention, backward": 0.43,
    "FlexAttention, forward": 0.147,  # heads of 256 whose scores are capped, as Gemma 2 has them
    "FlexAttention, backward": 0.072,
    "memory": 0.40,
    "optimizer": 0.76,
    "link": 0.43,
}
"""Fitted to an H100; other cards are taken to reach the same part of theirs, unless they were measured."""
FILE = "calibration.json"
"""In the cache folder: what `fiddlehead bench --calibrate` has measured, by `key_of` a card."""


def key_of(card: Card) -> str:
    """The name by which a card's measurements are kept: the same for the GPU here and for `--gpu NAME`."""
    return card.sheet or card.name


def measured(card: Card) -> Mapping[str, float]:
    """What was measured of a card on this machine, by the names of `REACHED`; empty if nothing was."""
    try:
        stamp = kept.stamp(cache_folder() / FILE)
    except OSError:
        return {}
    return _read(key_of(card), str(cache_folder()), stamp)


def reached(card: Card) -> Mapping[str, float]:
    """`REACHED`, with what was measured of this card instead."""
    found = measured(card)
    return {**REACHED, **found} if found else REACHED


@lru_cache(maxsize=64)  # a search for layouts asks thousands of times
def _read(key: str, folder: str, stamp: kept.Stamp) -> Mapping[str, float]:
    """Args: folder, stamp: of the file; it is read again when they have changed."""
    values = kept.read(FILE)
    values = values.get(key, {}) if isinstance(values, dict) else {}
    return {
        name: float(value)
        for name, value in (values.items() if isinstance(values, dict) else ())
        if name in REACHED and is_number(value) and math.isfinite(value) and value > 0
    }
