"""The GPUs that a plan knows: their memory, their speed, and which kernels they have."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from fiddlehead.attention import Target
from fiddlehead.errors import ConfigError, Problem

PCIE = 25e9
"""Bytes a second and direction between the GPUs of a node that have no NVLink, and between a GPU and main memory."""
MAIN_MEMORY = 43e9
"""Bytes a second and direction between a GPU and pinned main memory, both ways at once, as measured on an H100."""
ALIKE = 0.06
"""The part by which the memory of a device may differ from its card's; not all drivers reserve the same."""
FORM = "NAME=GiB,TFLOPs,GB/s[,watts], such as mine=48,362,864,300"


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
    sheet: str = ""
    """Its name in `CARDS`; "" if it is not one of them."""
    link_bytes_per_s: float = PCIE
    """A second and direction, between the GPUs of a node."""
    watts: float = 0.0
    """The power limit, most of which a GPU that trains takes; 0: not known."""

    @property
    def target(self) -> Target | None:
        """The device whose kernels serve; None if that is not known."""
        return Target.gpu(self.model) if self.model else None

    @classmethod
    def parse(cls, text: str) -> Card:
        """A card by its name in `CARDS`, or one of your own as NAME=GiB,TFLOPs,GB/s[,watts].

        Raises:
            ConfigError: no such card is known, or the numbers are not three or four above 0.
        """
        name, equals, numbers = text.strip().partition("=")
        key = name.strip().lower()
        if not equals:
            if key not in CARDS:
                raise ConfigError(Problem("gpu", text, f"is not a known GPU, nor {FORM}", CARDS))
            return CARDS[key]
        try:
            gib, tflops, gigabytes, *watts = given = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise ConfigError(Problem("gpu", text, f"must be {FORM}")) from None
        if not key or len(watts) > 1 or not all(number > 0 and math.isfinite(number) for number in given):
            raise ConfigError(Problem("gpu", text, f"needs a name and three or four numbers above 0: {FORM}"))
        return cls(key, gib, tflops * 1e12, gigabytes * 1e9, watts=sum(watts))

    @classmethod
    def of(cls, target: Target | None, device: torch.device | None = None) -> Card | None:
        """The card of a target: this machine's `device`, or one that is known by its name; None if it is not known."""
        if target is None or target.device_type != "cuda":
            return None
        if device is None:
            return CARDS.get(target.name)
        properties = torch.cuda.get_device_properties(device)
        return cls.of_device(properties.name, properties.total_memory)

    @classmethod
    def of_device(cls, name: str, memory: int) -> Card:
        """The card of a device by its name and its bytes of memory, as CUDA has them.

        What the data sheets do not say of such a device is not known: the speed of a part of a GPU (MIG), and that of
        the memory of a variant.
        """
        gib = memory / 2**30
        alike = [] if re.search(r"\bMIG\b", name) else _alike(name)
        if not alike:
            return cls(name, gib, 0.0, 0.0)
        nearest = min(alike, key=lambda card: abs(card.gib - gib))
        variant = "PCIe" in name and "pcie" not in nearest.sheet
        if variant or abs(nearest.gib - gib) > ALIKE * nearest.gib:
            link = PCIE if variant else nearest.link_bytes_per_s
            return replace(nearest, name=name, gib=gib, bytes_per_s=0.0, sheet="", link_bytes_per_s=link)
        return replace(nearest, name=name, gib=gib)

    @classmethod
    def called(cls, name: str) -> Card | None:
        """The card that somebody else calls so: a cluster's `h100`, `nvidia_h100_80gb_hbm3` or `A100-SXM4-40GB`.

        Without its memory in the name, it is the largest of that name. None if there is none.
        """
        if name.lower() in CARDS:
            return CARDS[name.lower()]
        words = re.sub(r"[_\s-]+", " ", name)
        if re.search(r"\b\d+g\.\d+gb\b", words, re.IGNORECASE):  # a part of a GPU
            return None
        alike = _alike(words)
        if (size := re.search(r"(\d+) ?gb", words, re.IGNORECASE)) is None:
            return max(alike, key=lambda card: card.gib, default=None)
        return min(alike, key=lambda card: abs(card.gib - int(size[1])), default=None)


def _alike(name: str) -> list[Card]:
    """The cards that have most words of a device's name, such as those of H100 NVL before those of H100."""
    found = [card for card in CARDS.values() if re.search(rf"\b{_WORDS[card.sheet]}\b", name, re.IGNORECASE)]
    longest = max((len(_WORDS[card.sheet]) for card in found), default=0)
    return [card for card in found if len(_WORDS[card.sheet]) == longest]


_WORDS: dict[str, str] = {}
"""Of each card in `CARDS`, the words of a device's name by which it is known."""


def _card(
    name: str,
    gib: float,
    tflops: float,
    gigabytes: float,
    *,
    words: str = "",
    model: str = "",
    link: float = PCIE,
    watts: float = 0,
) -> tuple[str, Card]:
    _WORDS[name] = words or name.upper()
    return name, Card(name, gib, tflops * 1e12, gigabytes * 1e9, model or name, name, link, watts)


CARDS: dict[str, Card] = dict(
    [
        _card("h100", 79.18, 989, 3350, link=450e9, watts=700),
        _card("h100_96", 94.5, 989, 4000, words="H100", model="h100", link=450e9, watts=700),
        _card("h100_nvl", 93.1, 835, 3900, words="H100 NVL", model="h100", link=300e9, watts=400),
        _card("h100_pcie", 79.2, 756, 2000, words="H100 PCIe", model="h100", watts=350),
        _card("gh200", 94.5, 989, 4000, model="h100", link=450e9),
        _card("h200", 139.8, 989, 4800, link=450e9, watts=700),
        _card("h200_nvl", 139.8, 835, 4800, words="H200 NVL", model="h200", link=450e9, watts=600),
        _card("h20", 95.1, 148, 4000, model="h100", link=450e9, watts=400),
        _card("a100", 79.15, 312, 2039, link=300e9, watts=400),
        _card("a100_40", 39.39, 312, 1555, words="A100", model="a100", link=300e9, watts=400),
        _card("a30", 23.6, 165, 933, model="a100", watts=165),
        _card("a10", 22.0, 125, 600, model="a10g", watts=150),
        _card("a10g", 22.0, 70, 600),
        _card("l40s", 44.39, 362, 864, watts=350),
        _card("l40", 44.39, 181, 864, model="l40s", watts=300),
        _card("l4", 22.0, 121, 300, watts=72),
        _card("b200", 178.35, 2250, 8000, link=900e9, watts=1000),
        _card("gb200", 184.3, 2500, 8000, model="b200", link=900e9, watts=1200),
        _card("b300", 267.7, 2250, 8000, link=900e9, watts=1100),
        _card("gb300", 276.5, 2500, 8000, model="b300", link=900e9, watts=1400),
        _card("rtx4090", 23.64, 165, 1008, words="RTX 4090", watts=450),
    ]
)
"""By name, from NVIDIA's data sheets: dense products, which are half of those with sparsity, a direction of NVLink,
which is half of the sum, and the highest power limit. Those of h20, gb200, b300 and gb300 are what vendors publish.
The bridge that joins two A30 is not counted. The memory of h100 and h200 was measured; that of the others was not, and
may be a percent off. Lightning's own table of products has the H200 with sparsity, and two cards for an H100 NVL."""
