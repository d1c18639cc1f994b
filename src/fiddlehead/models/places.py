"""Where the tokens of a batch stand: their positions, and the documents that they belong to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fiddlehead.models.moe import Sequences


class Documents(NamedTuple):
    """Where the documents in a batch begin and end."""

    cu_seqlens: torch.Tensor
    max_seqlen: int | None


class Places(NamedTuple):
    """Where the tokens of a batch stand."""

    positions: torch.Tensor
    """Positions in the sequence or document, (T,) or (B, T), of whole sequences."""
    length: int
    """A length above all positions."""
    lengths: torch.Tensor | None
    """The length of each position's sequence or document, (B, T), where the result depends on it."""
    documents: Documents | None
    sequences: Sequences | None = None
    """The tokens over which the balancing loss is taken; None without that loss."""


def documents_of(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The index of each token's document, (tokens,) int64."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, token, right=True) - 1


def positions_in_documents(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The position of each token in its own document, (tokens,)."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return token - cu_seqlens[documents_of(cu_seqlens, tokens)]
