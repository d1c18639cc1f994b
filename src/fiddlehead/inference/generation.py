"""Generates tokens with a model, one at a time, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from fiddlehead.attention import KVCache
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.inference.speculative import Draft, speculate
from fiddlehead.models.compiled_step import CompiledStep
from fiddlehead.models.transformer import Transformer
from fiddlehead.numbers import is_number, is_whole


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among this many of the likeliest; 0 among all."""
    top_p: float = 1.0
    """Choose among the likeliest that together have at least this probability (Holtzman et al. 2020)."""
    seed: int = 0
    """The same seed gives the same tokens; each sequence of a batch has its own seed, counted from this one."""
    banned: tuple[int, ...] = ()
    """Tokens that are never chosen, such as the unused ids of a padded vocabulary."""

    def __post_init__(self) -> None:
        problems = [
            Problem(name, value, f"must be a {kind} of 0 or more")
            for name, value, sound, kind in (
                ("temperature", self.temperature, is_number, "finite number"),
                ("top_k", self.top_k, is_whole, "whole number"),
                ("seed", self.seed, is_whole, "whole number"),
            )
            if not (sound(value) and value >= 0)
        ]
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            problems.append(Problem("top_p", self.top_p, "must be above 0 and at most 1"))
        refuse(problems)

    def generators(self, count: int, device: torch.device) -> list[torch.Generator]:
        """A random generator for each sequence."""
        return [torch.Generator(device).manual_seed(self.seed + number) for number in range(count)]

    def choose(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Chooses a token for each sequence, (B,), from the logits, (B, V)."""
        if self.temperature == 0:
            return _likeliest(self._allowed(logits))
        rows = self.probabilities(logits)
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(rows, generators, strict=True)])

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The probabilities with which a token is chosen from the logits, both (B, V); in float32."""
        logits = self._allowed(logits)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
        logits = logits.float()
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = (logits / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token stays if those before it do not have enough yet; the likeliest always does.
            dropped = torch.zeros_like(ordered, dtype=torch.bool)
            dropped.scatter_(1, order, ordered.cumsum(dim=-1) - ordered >= self.top_p)
            probabilities = probabilities.masked_fill(dropped, 0.0)
            probabilities /= probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.banned:
            return logits
        return logits.index_fill(-1, _on_device(self.banned, logits.device), float("-inf"))


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The index of the greatest logit of each sequence, (B, V) to (B,); the first one of equals."""
    if not logits.is_cuda:
        return logits.argmax(dim=-1)
    # In two steps, because a GPU has one multiprocessor search a whole row.
    parts = F.pad(logits, (0, -logits.shape[-1] % 256), value=float("-inf")).unflatten(-1, (-1, 256))
    most, place = parts.max(dim=-1)
    part = most.argmax(dim=-1, keepdim=True)
    return (part * 256 + place.gather(-1, part))[:, 0]


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    compile: bool = False,
    banned: tuple[int, ...] = (),
    draft: Draft | None = None,
) -> Iterator[int]:
    """Yields tokens that follow `prompt`; the model sees at most its `seq_length` newest ones.

    Args:
        temperature, top_k, top_p, seed, banned: as in `Sampling`.
        compile: on a GPU, run each step as one `CompiledStep`, after some seconds of compiling.
        draft: drafts tokens, which the model checks in one pass.

    Raises:
        ConfigError: the prompt is empty, a token is not in the vocabulary, or a number makes no sense; or the draft
            cannot draft for the model.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, banned=banned)
    generators = sampling.generators(1, model.embedding.weight.device)
    ids = list(prompt)
    for (token,) in _continuations(model, [ids], max_new_tokens, sampling, generators, compile, draft):
        ids.append(token)
        yield token
    # The model has seen as much as it can: from here on the oldest token is forgotten for each new one, and every
    # position changes, so that nothing can be kept.
    while len(ids) < len(prompt) + max_new_tokens:
        context = torch.tensor([ids[-(model.config.seq_length or 0) :]], device=model.embedding.weight.device)
        logits = model.logits(model.hidden(context)[:, -1])
        ids.append(int(sampling.choose(logits, generators)))
        yield ids[-1]


@torch.no_grad()
def sample_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    *,
    seeds: Sequence[int] | None = None,
    ends: Callable[[list[int]], bool] = lambda written: False,
    compile: bool = False,
    draft: Draft | None = None,
) -> list[list[int]]:
    """Generates the tokens that follow each prompt, as one batch; prompts may differ in length.

    A sequence ends before a token of `stop_ids`. All end when the longest reaches the model's `seq_length`.

    Args:
        seeds: one for each sequence, instead of `sampling.seed` and the following numbers.
        ends: whether a sequence ends with the tokens generated so far.
        compile: as in `sample`.
        draft: as in `sample`; the texts are then generated one after the other.

    Raises:
        ConfigError: as `sample`; also if a prompt is as long as `seq_length`.
    """
    sampling = sampling or Sampling()
    device = model.embedding.weight.device
    generators = sampling.generators(len(prompts), device)
    if seeds is not None:
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    limit = model.config.seq_length
    if limit is not None and (long := [len(prompt) for prompt in prompts if len(prompt) >= limit]):
        message = f"have {', '.join(map(str, long))} tokens, and the model writes up to seq_length={limit}"
        raise ConfigError(Problem("prompts", message=message))
    if draft is not None and len(prompts) > 1:
        seeds = range(sampling.seed, sampling.seed + len(prompts)) if seeds is None else seeds
        each = {"ends": ends, "compile": compile, "draft": draft}
        return [
            sample_batch(model, [prompt], max_new_tokens, sampling, stop_ids, seeds=[seed], **each)[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    written: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for tokens in _continuations(model, prompts, max_new_tokens, sampling, generators, compile, draft):
        for number, token in enumerate(tokens):
            room = limit is None or len(prompts[number]) + len(written[number]) < limit
            going[number] = going[number] and token not in stop_ids and room
            if going[number]:
                written[number].append(token)
                going[number] = not ends(written[number])
        if not any(going):
            break
    return written


def _continuations(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    compile: bool,
    draft: Draft | None = None,
) -> Iterator[list[int]]:
    """Yields the next token of every sequence, as long as the longest is within the model's `seq_length`."""
    config, weight = model.config, model.embedding.weight
    vocab_size = config.vocab_size or 0
    if not (is_whole(max_new_tokens) and max_new_tokens >= 0):
        raise ConfigError(Problem("max_new_tokens", max_new_tokens, "must be a whole number of 0 or more"))
    for prompt in prompts:
        if not prompt or not all(0 <= token < vocab_size for token in prompt):
            raise ConfigError(
                Problem("prompt", list(prompt), f"needs at least one token, each below vocab_size={vocab_size}")
            )
    if draft is not None:
        _refuse_vocabulary(draft, vocab_size, sampling)
        (prompt,), (generator,) = prompts, generators
        for token in speculate(model, draft, prompt, max_new_tokens, sampling.probabilities, generator, compile):
            yield [token]
        return
    lengths = [len(prompt) for prompt in prompts]
    room = min(max(lengths) + max_new_tokens, config.seq_length or max(lengths) + max_new_tokens)
    if max(lengths) > room:
        return
    caches = [
        KVCache.allocate(len(prompts), room, config.groups, config.head_dim, weight.dtype, weight.device)
        for _ in range(config.num_layers)
    ]
    step = partial(_step, CompiledStep(model, caches) if compile else partial(_logits, model, caches))
    texts = [list(prompt) for prompt in prompts]
    logits = _begin(model, caches, texts, compile)
    for number in range(max_new_tokens):
        tokens = sampling.choose(logits, generators)
        chosen = _on_host(tokens)
        more = max(lengths) + number < room and number + 1 < max_new_tokens
        # With its next token LongRoPE turns all keys of a text by other factors than those in the cache.
        anew = config.longrope_length is not None and config.longrope_length - number in lengths
        if more and weight.is_cuda and not anew:  # the GPU goes on while the host looks at what was chosen
            logits = step(tokens)
        new = chosen()
        yield new
        if not more:
            return
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        if anew:
            logits = _begin(model, caches, texts, compile)
        elif not weight.is_cuda:
            logits = step(tokens)


def _refuse_vocabulary(draft: Draft, vocab_size: int, sampling: Sampling) -> None:
    own = draft.model.config.vocab_size or 0
    if set(range(own, vocab_size)) - set(sampling.banned):
        message = f"has a vocabulary of {own}, and the model one of {vocab_size}; both must have the same tokenizer"
        raise ConfigError(Problem("draft", message=message))


def _begin(
    model: Transformer, caches: Sequence[KVCache], texts: Sequence[Sequence[int]], compile: bool
) -> torch.Tensor:
    """Fills the caches with the prompts; returns the logits of the next tokens, (B, V)."""
    for cache in caches:
        cache.reset()
    device, lengths = model.embedding.weight.device, [len(text) for text in texts]
    padded = [[*text, *[0] * (max(lengths) - len(text))] for text in texts]
    ids, last = torch.tensor(padded, device=device), torch.tensor(lengths, device=device)
    alike = min(lengths) == max(lengths) and not compile  # a captured step finds the lengths on the device
    x = model.hidden(ids, caches=caches, new_lengths=None if alike else last)
    return model.logits(x[torch.arange(len(texts), device=device), last - 1])


@lru_cache(maxsize=8)
def _on_device(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A tensor on the device, kept because a copy to the GPU for each token would delay it."""
    return torch.tensor(ids, device=device)


def _on_host(tokens: torch.Tensor) -> Callable[[], list[int]]:
    """Starts a copy from the GPU; the result waits only for this copy, not for later work."""
    if not tokens.is_cuda:
        return tokens.tolist
    copy = torch.empty_like(tokens, device="cpu", pin_memory=True).copy_(tokens, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return copy.tolist()

    return wait


def _step(logits: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The next tokens, (B,), to logits, (B, V)."""
    return logits(tokens[:, None])[:, 0]


def _logits(model: Transformer, caches: Sequence[KVCache], tokens: torch.Tensor) -> torch.Tensor:
    """The next tokens, (B, T), to logits, (B, T, V)."""
    return model.logits(model.hidden(tokens, caches=caches))
