"""Writing text with a model, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fiddlehead.errors import ConfigError
from fiddlehead.models.transformer import Transformer


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields tokens that follow `prompt`; the model sees at most its `seq_length` newest ones.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many of the likeliest; 0 among all.
        seed: the same seed yields the same tokens.

    Raises:
        ConfigError: the prompt is empty, a token is not in the vocabulary, or a number is negative.
    """
    if temperature < 0 or top_k < 0:
        raise ConfigError(f"temperature={temperature}, top_k={top_k}: must not be negative")
    vocab_size = model.config.vocab_size or 0
    if not prompt or not all(0 <= token < vocab_size for token in prompt):
        raise ConfigError(f"prompt={list(prompt)}: needs at least one token, each below vocab_size={vocab_size}")
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    context = torch.tensor([list(prompt)], device=device)
    for _ in range(max_new_tokens):
        logits = model(context[:, -(model.config.seq_length or context.shape[1]) :])[0, -1].float()
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            if top_k:
                smallest_kept = logits.topk(min(top_k, vocab_size)).values[-1]
                logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        context = torch.cat([context, token[None]], dim=1)
        yield int(token)
