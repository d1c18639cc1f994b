"""Rules for choosing between flash-attn 4 and cuDNN on Hopper, from measurements on an H100."""

from __future__ import annotations

from fiddlehead.attention.spec import AttentionSpec

NARROW = 64
"""The head dim up to which heads count as narrow."""


def is_decoding(spec: AttentionSpec) -> bool:
    """Whether a call without gradients may have few queries and many keys."""
    return not spec.training and (spec.cached or not (spec.causal or spec.same_length))


def cudnn_starts_first(spec: AttentionSpec) -> bool:
    """Whether sequences are so short that cuDNN's faster start makes it faster than the flash-attn packages."""
    if is_decoding(spec) or not 0 < spec.length <= 1024:
        return False
    narrow = spec.head_dim <= NARROW
    if not spec.training:
        return narrow
    grouped = 1 < spec.num_query_groups < spec.num_attention_heads
    return grouped and (not narrow or gradient_padding(spec.head_dim) > 0)


def gradient_padding(head_dim: int) -> int:
    """How many channels of zeros flash-attn 4 needs for right gradients on Hopper.

    Up to 128 channels its kernel writes sums of the gradients in tiles of a multiple of 16 channels, and the kernel
    that reads them expects tiles of a multiple of 32 (4.0.0b36; flash_bwd_sm90.py and flash_bwd_postprocess.py). Where
    the two differ, as for 80, the gradients are wrong without an error.
    """
    missing = -head_dim % 32
    return missing if head_dim <= 128 and missing >= 16 else 0
