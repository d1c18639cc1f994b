"""What the compiler keeps of a layer where it may keep a part of its activations: `activation_checkpointing=0.5`.

PyTorch's partitioner chooses (`choose_saved_values_set` of `torch._functorch.partitioners`, the same in 2.11 to 2.13);
the tests compare both. The part is a share of the bytes that it would keep in all, without the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Chosen:
    """What is kept besides a layer's input."""

    products: frozenset[str]
    """The outputs of these products, of "qkv", "out", "up" and "down"."""
    attention: bool = False
    """Attention's output."""
    cheap: bool = False
    """What costs next to nothing to compute again."""


def choose(part: float, all: float, dear: float, sizes: Mapping[str, float], flops: Mapping[str, float]) -> Chosen:
    """The products that are kept.

    Args:
        part: of `all` that may be kept; under 1.
        all: bytes that would be kept if all were, besides the inputs.
        dear: what is left of them without those that cost next to nothing to compute again.
        sizes: bytes of each product's output that the backward pass needs.
        flops: of each product.
    """
    if all <= 0:
        return Chosen(frozenset(sizes), attention=True, cheap=True)
    if dear < part * all:
        return Chosen(frozenset(sizes), attention=True)
    if sum(sizes.values()) < part * all:
        return Chosen(frozenset(sizes))
    choices = [each for count in range(len(sizes) + 1) for each in combinations(sizes, count)]
    fitting = [each for each in choices if sum(sizes[name] for name in each) <= part * all]
    return Chosen(frozenset(max(fitting, key=lambda each: sum(flops[name] for name in each))))
