"""The GPUs that a plan knows: their memory, their speed, and which kernels they have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fiddlehead.attention import Target
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.training.callbacks.metrics import peak_flops

FORM = "NAME=GiB,TFLOPs,GB/s, such as mine=48,362,864"


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet."""

    name: str
    gib: float
    """Of memory, as CUDA reports it: what is left by ECC and the driver."""
    flops: float
    """Dense bfloat16 products with float32 sums, a second; 0: not known."""
    bytes_per_s: float
    """Of its memory; 0: not known."""
    model: str = ""
    """The name by which `Target.gpu` knows its kernels; "" if it does not."""

    @property
    def target(self) -> Target | None:
        """The device whose kernels serve; None if that is not known."""
        return Target.gpu(self.model) if self.model else None

    @classmethod
    def parse(cls, text: str) -> Card:
        """A card by its name in `CARDS`, or one of your own as NAME=GiB,TFLOPs,GB/s.

        Raises:
            ConfigError: no such card is known, or the numbers are not three above 0.
        """
        name, equals, numbers = text.strip().partition("=")
        key = name.strip().lower()
        if not equals:
            if key not in CARDS:
                raise ConfigError(Problem("gpu", text, f"is not a known GPU, nor {FORM}", CARDS))
            return CARDS[key]
        try:
            gib, tflops, gigabytes = (float(number) for number in numbers.split(","))
        except ValueError:
            raise ConfigError(Problem("gpu", text, f"must be {FORM}")) from None
        if not key or not all(number > 0 and math.isfinite(number) for number in (gib, tflops, gigabytes)):
            raise ConfigError(Problem("gpu", text, f"needs a name and three numbers above 0: {FORM}"))
        return cls(key, gib, tflops * 1e12, gigabytes * 1e9)

    @classmethod
    def of(cls, target: Target | None, device: torch.device | None = None) -> Card | None:
        """The card of a target: this machine's `device`, or one that is known by its name; None if it is not known."""
        if target is None or target.device_type != "cuda":
            return None
        if device is not None:
            properties = torch.cuda.get_device_properties(device)
            gib = properties.total_memory / 2**30
            known = _named(properties.name, gib)
            flops, bandwidth = (0.0, 0.0) if known is None else (known.flops, known.bytes_per_s)
            return cls(properties.name, gib, peak_flops(device) or flops, bandwidth)
        return CARDS.get(target.name)


def _named(name: str, gib: float) -> Card | None:
    """The card of a device's whole name, as CUDA gives it, and its memory; None of variants with a slower memory."""
    words = [word.split("-")[0] for word in name.lower().replace("rtx ", "rtx").split()]
    if {"pcie", "nvl"}.intersection(words):
        return None
    alike = [card for card in CARDS.values() if card.model in words]
    return min(alike, key=lambda card: abs(card.gib - gib), default=None)


def _card(name: str, gib: float, tflops: float, gigabytes: float, model: str = "") -> tuple[str, Card]:
    return name, Card(name, gib, tflops * 1e12, gigabytes * 1e9, model or name)


CARDS: dict[str, Card] = dict(
    [
        _card("h100", 79.18, 989, 3350),
        _card("h100_96", 94.5, 989, 4000, "h100"),
        _card("h200", 139.8, 989, 4800),
        _card("a100", 79.15, 312, 2039),
        _card("a100_40", 39.39, 312, 1555, "a100"),
        _card("l40s", 44.39, 362, 864),
        _card("b200", 178.35, 2250, 8000),
        _card("b300", 267.7, 2250, 8000),
        _card("rtx4090", 23.64, 165, 1008),
    ]
)
"""By name. The memory of h100 and h200 was measured; that of the others was not, and may be a percent off."""
