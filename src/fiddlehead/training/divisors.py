"""The divisors that turn sums over a micro-batch on a rank into means over a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import Strategy


class Divisors(NamedTuple):
    """The divisors that turn sums over a micro-batch on this rank into means over the whole step.

    Lightning averages over the micro-batches, and the strategy over the ranks. So each divisor is the number in the
    step divided by the number of these parts.
    """

    labels: torch.Tensor | int
    tokens: torch.Tensor | int
    """Without padding."""
    pairs: torch.Tensor | int

    @classmethod
    def of_step(cls, batch: Mapping[str, Any], micro_batches: int, strategy: Strategy, parts: int) -> Divisors:
        """Those of the step of so many micro-batches that begins with this one; all ranks call it together.

        Args:
            batch: this rank's part of the first micro-batch.
            parts: how many ranks share each sequence.
        """
        if "in_step" not in batch:  # every micro-batch on every rank has as many tokens
            size = batch["labels"].numel()
            return cls(size, size, 0)
        # Ranks that share a sequence have the same counts; the mean counts them once.
        counted = strategy.reduce(batch["in_step"].float(), reduce_op="mean")
        labels, tokens, pairs = torch.as_tensor(counted) / micro_batches
        return cls(labels / parts, tokens / parts, pairs)  # each such rank has a part of the tokens, and all pairs
