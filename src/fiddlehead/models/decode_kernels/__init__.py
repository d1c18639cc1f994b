"""Triton kernels of a decoding step: sequences have a few new tokens, so that all time is spent on reading weights.

A step's kernels depend on each other, and one alone lasts a few microseconds. On GPUs from Hopper on a kernel therefore
starts while the one before it still runs, reads its first weights, and then waits for that one's results (programmatic
dependent launch).

Shapes: B sequences of T new tokens, K and N channels of a product's input and output, H query heads, G key/value heads,
D head dim, R rotary channels.
"""

from fiddlehead.models.decode_kernels.cached_attention import attend_to_cache
from fiddlehead.models.decode_kernels.products import product

__all__ = ["attend_to_cache", "product"]
