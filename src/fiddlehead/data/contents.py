"""What is known of data before a run opens it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contents:
    """What one path of the data has; None is what is not known before the data is opened."""

    path: str
    tokens: int | None = None
    samples: int | None = None
    """What `global_batch_size` counts: windows of tokens, or rows of examples."""
    examples: int | None = None
    share: float | None = None
    """The part of the run's samples that come from it; None: as many as it has, with all others."""


@dataclass(frozen=True)
class Known:
    """What is known of data."""

    train: tuple[Contents, ...] = ()
    val: tuple[Contents, ...] = ()
    tokenizer: str = ""
    """Where the tokenizer is from; "" if that is not known."""
    vocab_size: int | None = None
    packing: str = ""
    """How samples are made, in words; "" if there is nothing to say."""
    pairs: bool = False
    """Whether examples are pairs of answers to compare."""
    endless: bool = False
    """Whether samples are made up as they are needed."""
