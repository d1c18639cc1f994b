"""Speculative decoding: a small model drafts tokens, and the model checks them in one pass (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fiddlehead.attention import KVCache, truncate_together
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models import Transformer
from fiddlehead.models.compiled_step import CompiledStep

DRAFTED = 4
"""The tokens that are drafted for a pass of the model."""

Probabilities = Callable[[torch.Tensor], torch.Tensor]
"""Takes logits (..., V) and returns the probabilities of the next token."""


@dataclass
class Draft:
    """A small model that drafts tokens for a larger one, and how well it does.

    The two must have the same tokens. The larger model's output does not depend on the draft: the likeliest tokens are
    the same, and sampled ones have the same distribution.
    """

    model: Transformer
    passes: int = 0
    """Of the larger model, so far."""
    tokens: int = 0
    """That these passes have given."""

    @property
    def tokens_per_pass(self) -> float:
        """1 if no drafted token was ever right, and at most 1 more than are drafted."""
        return self.tokens / max(self.passes, 1)


def speculate(
    model: Transformer,
    draft: Draft,
    prompt: Sequence[int],
    max_new_tokens: int,
    probabilities: Probabilities,
    generator: torch.Generator,
    compile: bool = False,
) -> Iterator[int]:
    """Yields the tokens that follow `prompt`, as long as the text is within the model's `seq_length`.

    Args:
        prompt: valid tokens, at least one.
        compile: run each pass of the models as one `CompiledStep`.

    Raises:
        ConfigError: a model has LongRoPE, whose keys change with the text's length.
    """
    for config in (model.config, draft.model.config):
        if config.longrope_length is not None:
            raise ConfigError(Problem("draft", message="a model with LongRoPE neither drafts nor takes drafted tokens"))
    text, end = list(prompt), len(prompt) + max_new_tokens
    room = min(end, model.config.seq_length or end)
    if len(text) > room:
        return
    large = _Reader(model, room, DRAFTED + 1 if compile else 0)
    small = _Reader(draft.model, min(room, draft.model.config.seq_length or room), 1 if compile else 0)
    vocab_size = model.config.vocab_size or 0
    while len(text) <= room and len(text) < end:
        most = min(DRAFTED, end - len(text) - 1, room - len(text), small.room - len(text) + 1)
        drafted, guesses = [], []
        for _ in range(max(most, 0)):
            guess = probabilities(_of_size(small.logits([*text, *drafted], 1), vocab_size))[0]
            drafted.append(int(torch.multinomial(guess, 1, generator=generator)))
            guesses.append(guess)
        wanted = probabilities(large.logits([*text, *drafted], 1 + len(drafted)))
        kept, token = accept(wanted, guesses, drafted, generator)
        for reader in (large, small):
            reader.forget_after(len(text) + kept)
        new = [*drafted[:kept], token]
        draft.passes, draft.tokens = draft.passes + 1, draft.tokens + len(new)
        yield from new
        text += new


def accept(
    wanted: torch.Tensor, guesses: Sequence[torch.Tensor], drafted: Sequence[int], generator: torch.Generator
) -> tuple[int, int]:
    """How many of the n drafted tokens are kept, and the token after them.

    Together they have the distribution of tokens that the model itself chooses one after the other.

    Args:
        wanted: the model's probabilities at each drafted token, and after the last one, (n + 1, V).
        guesses: the probabilities from which each token was drafted, n times (V,).
    """
    chances = torch.rand(len(drafted), generator=generator, device=wanted.device).tolist()
    for place, (guess, token, chance) in enumerate(zip(guesses, drafted, chances, strict=True)):
        if chance >= float(wanted[place, token] / guess[token]):
            return place, int(torch.multinomial(residual(wanted[place], guess), 1, generator=generator))
    return len(drafted), int(torch.multinomial(wanted[len(drafted)], 1, generator=generator))


def residual(wanted: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """The weights, (V,), with which a token is chosen in place of a drafted one that was not kept."""
    rest = (wanted - guess).clamp(min=0)
    return torch.where(rest.sum() > 0, rest, wanted)  # if they differ by no more than rounding


class _Reader:
    """A model that has read the beginning of a text, of at most `room` tokens.

    With `compiled` above 0, it reads so many tokens at a time in a `CompiledStep`; the prompt it reads at once.
    """

    def __init__(self, model: Transformer, room: int, compiled: int) -> None:
        config, weight = model.config, model.embedding.weight
        self.model, self.room, self.compiled = model, room, compiled
        self.caches = [
            KVCache.allocate(1, max(room, 1), config.groups, config.head_dim, weight.dtype, weight.device)
            for _ in range(config.num_layers)
        ]
        self.step = CompiledStep(model, self.caches, compiled) if compiled else None

    def logits(self, text: Sequence[int], count: int) -> torch.Tensor:
        """Reads the rest of the text; the logits after each of its last `count` tokens, (count, V)."""
        while True:
            start = self.caches[0].length
            fits = self.step is not None and 0 < start <= self.room - self.compiled
            part = text[start : start + self.compiled] if fits else text[start:]
            logits = self._step(part) if fits else self._read(part)
            if start + len(part) == len(text):
                return logits[-count:]

    def _read(self, tokens: Sequence[int]) -> torch.Tensor:
        new = torch.tensor([[*tokens]], device=self.model.embedding.weight.device)
        lengths = None if self.step is None else torch.tensor([len(tokens)], device=new.device)
        return self.model.logits(self.model.hidden(new, caches=self.caches, new_lengths=lengths)[0])

    def _step(self, tokens: Sequence[int]) -> torch.Tensor:
        assert self.step is not None
        end = self.caches[0].length + len(tokens)
        padded = [*tokens, *[0] * (self.compiled - len(tokens))]
        logits = self.step(torch.tensor([padded], device=self.model.embedding.weight.device))[0, : len(tokens)]
        self.forget_after(end)
        return logits

    def forget_after(self, length: int) -> None:
        """Forgets what it has read after the first `length` tokens."""
        if self.caches[0].length <= length:
            return
        if self.step is not None:
            truncate_together(self.caches, length)
            return
        for cache in self.caches:
            cache.truncate(length)


def _of_size(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits for `vocab_size` tokens: a padded vocabulary may have more ids or fewer."""
    return F.pad(logits, (0, vocab_size - logits.shape[-1]), value=float("-inf"))
