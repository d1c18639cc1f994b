"""A model with its tokenizer: it continues prompts, answers in a chat, and computes the likelihood of a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from fiddlehead.checkpoints.weights import find_tokenizer, find_weights, load_transformer, open_weights
from fiddlehead.data import TokenizerFile
from fiddlehead.data.chat_template import ChatTemplate, Message
from fiddlehead.data.tokenizers import refuse_missing_rows
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.inference.generation import Sampling, sample, sample_batch
from fiddlehead.inference.speculative import Draft
from fiddlehead.models import Transformer
from fiddlehead.models.compiled_step import refuse_compiled_step
from fiddlehead.models.int8 import to_int8

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decodes to it may be the beginning of a character


@dataclass(frozen=True)
class Completion:
    """The text that a model generated after a prompt."""

    ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    """"stop": a document ended, or a text came before which to stop; "length": there was no room for more."""


@dataclass(frozen=True)
class Writer:
    """A model that generates text."""

    model: Transformer
    tokenizer: TokenizerFile
    template: ChatTemplate | None
    name: str
    compile: bool = False
    """Whether each step is one launch, as `generation.sample` takes it."""
    draft: Draft | None = None
    """Drafts tokens for the model."""

    @classmethod
    def open(
        cls,
        source: str | Path,
        runs: str | Path = "runs",
        *,
        compile: bool = False,
        draft: str | Path | None = None,
        weights: str | None = None,
    ) -> Writer:
        """Loads the model of a run, a checkpoint, an imported checkpoint, or a Hugging Face folder.

        Args:
            draft: a smaller model with the same tokenizer, named in the same way, which drafts tokens.
            weights: how the layers' weights are stored: "int8" has a scale for each output channel; None: as they are.

        Raises:
            ConfigError: there is none, it has no tokenizer, it cannot be compiled, or the draft cannot draft for it.
        """
        if weights not in (None, "int8"):
            raise ConfigError(Problem("weights", weights, "", ("int8",)))
        path = find_weights(source, runs)
        folder = find_tokenizer(path)
        if folder is None:
            raise ConfigError(Problem.in_file(source, "has no tokenizer.json beside its weights"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stored = open_weights(path)
        if compile:
            refuse_compiled_step(stored.config, device, torch.get_default_dtype())
        model = load_transformer(stored).eval()
        if weights is not None:
            to_int8(model)
        made = cls(model.to(device), TokenizerFile(folder), ChatTemplate.load(folder), str(source), compile)
        if draft is None:
            return made
        small = cls.open(draft, runs, compile=compile)
        if small.tokenizer.fingerprint != made.tokenizer.fingerprint:
            message = f"has another tokenizer than {source}; a draft needs the tokens of the model that it drafts for"
            raise ConfigError(Problem("draft", draft, message))
        return replace(made, draft=Draft(small.model))

    def write(
        self, prompt: str, max_new_tokens: int = 200, *, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """Yields, piece by piece, the text that follows a prompt.

        Args:
            stop: the text ends before any of these.
            sampling: `temperature`, `top_k`, `top_p` and `seed`, as in `generation.sample`.

        Raises:
            ConfigError: the prompt cannot be used.
        """
        texts = self._texts(self.tokenizer.encode_prompt(prompt), max_new_tokens, sampling)
        spaces = prompt[len(prompt.rstrip(" ")) :]  # which it is not given, and writes itself
        yield from until(stop, (text.removeprefix(spaces) for text in texts))

    def write_all(
        self, prompts: Sequence[str], max_new_tokens: int = 200, *, stop: Sequence[str] = (), **options: Any
    ) -> list[Completion]:
        """The texts after several prompts, as from `write`, but at most up to the model's `seq_length`.

        Args:
            stop: a text ends before any of these.
            options: `sampling`, `seeds`, `batch_size` and `advance`, as in `complete`.

        Raises:
            ConfigError: a prompt cannot be used.
        """
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        completed = self.complete(ids, max_new_tokens, stop=stop, **options)
        found = []
        for prompt, before, written in zip(prompts, ids, completed, strict=True):
            text = self.tokenizer.decode([*before, *written.ids]).removeprefix(self.tokenizer.decode(before))
            text = text.rstrip(_INCOMPLETE).removeprefix(prompt[len(prompt.rstrip(" ")) :])
            text = "".join(until(stop, [text]))
            found.append(replace(written, text=text))
        return found

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        advance: Callable[[int], Any] = lambda _: None,
    ) -> list[Completion]:
        """Completes several prompts of tokens; prompts of similar length share a batch.

        Args:
            stop: a text ends after any of these.
            seeds: one for each prompt; None: that of `sampling` for all, so each text is the same as alone.
            advance: is called with the number of new finished prompts.

        Raises:
            ConfigError: a prompt cannot be used.
        """
        sampling, ends = replace(sampling or Sampling(), banned=self._banned), self.tokenizer.stop_ids
        limit = self.model.config.seq_length or sys.maxsize
        # Of a token each byte at most is one of a stop's; one more in front, whose space the decoder may drop.
        tail = max((len(word.encode()) for word in stop), default=0) + 1

        def stopped(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-tail:]) if stop else ""
            return any(word in text for word in stop)

        for prompt in prompts:
            self.refuse_missing_rows(prompt)
        found: dict[int, Completion] = {}
        for batch in _batches([len(prompt) for prompt in prompts], batch_size, limit - max_new_tokens):
            texts = sample_batch(
                self.model,
                [prompts[number] for number in batch],
                max_new_tokens,
                sampling,
                ends,
                seeds=[sampling.seed if seeds is None else seeds[number] for number in batch],
                ends=stopped,
                compile=self.compile,
                draft=self.draft,
            )
            for number, ids in zip(batch, texts, strict=True):
                full = len(ids) == min(max_new_tokens, limit - len(prompts[number]))
                reason = "length" if full and not stopped(ids) else "stop"
                found[number] = Completion(ids, self.tokenizer.decode(ids), reason)
            advance(len(batch))
        return [found[number] for number in range(len(prompts))]

    def answer(self, messages: Sequence[Message], max_new_tokens: int = 500, **sampling: Any) -> Iterator[str]:
        """Yields, piece by piece, the assistant's next message.

        Raises:
            ConfigError: the model has no chat template, or it refuses the messages.
        """
        if self.template is None:
            message = "has no chat template (chat_template.jinja); `fiddlehead generate` takes plain text"
            raise ConfigError(Problem.in_file(self.name, message))
        ids = self.tokenizer.encode_with_special(self.template.render(messages, add_generation_prompt=True))
        yield from until((), self._texts(ids, max_new_tokens, sampling))

    def _texts(self, ids: list[int], max_new_tokens: int, sampling: dict[str, Any]) -> Iterator[str]:
        """Yields the whole new text each time that it grows."""
        self.refuse_missing_rows(ids)
        ends, before = self.tokenizer.stop_ids, self.tokenizer.decode(ids)
        ids = list(ids)
        options = {"compile": self.compile, "draft": self.draft, "banned": self._banned, **sampling}
        for token in sample(self.model, list(ids), max_new_tokens, **options):
            if token in ends:
                return
            ids.append(token)
            text = self.tokenizer.decode(ids).removeprefix(before)
            if not text.endswith(_INCOMPLETE):
                yield text

    def refuse_missing_rows(self, ids: Sequence[int]) -> None:
        """Raises ConfigError for tokens of a text that the model has not learned."""
        refuse_missing_rows(self.tokenizer, ids, self.model.config.vocab_size or 0, "the text")

    @cached_property
    def _banned(self) -> tuple[int, ...]:
        """The ids that are not tokens, in a padded vocabulary."""
        return tuple(self.tokenizer.ids_without_token(self.model.config.vocab_size or 0))


def until(stop: Sequence[str], texts: Iterable[str]) -> Iterator[str]:
    """Yields the new part of each longer text, up to the first of `stop`; text that may become a stop is held back."""
    written, text = "", ""
    for text in texts:
        found = [at for word in stop if (at := text.find(word)) >= 0]
        if found:
            yield text[len(written) : min(found)]
            return
        held = max((_overlap(text, word) for word in stop), default=0)
        safe = text[: len(text) - held]
        yield safe[len(written) :]
        written = max(written, safe, key=len)
    yield text[len(written) :]


def _batches(lengths: Sequence[int], size: int, free: int) -> Iterator[list[int]]:
    """Yields the indices of the prompts of each batch, the longest first.

    A batch ends with its longest text, so a prompt longer than `free` is batched only with prompts of its length.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fits = not batch or lengths[batch[0]] == lengths[number] or lengths[batch[0]] <= free
        if len(batch) == size or not fits:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _overlap(text: str, word: str) -> int:
    """The number of characters at the end of `text` that are the beginning of `word`."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts a text."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """The perplexity of a token."""
        return math.exp(self.nats / self.tokens)


@torch.no_grad()
def likelihood(
    writer: Writer, text: str, stride: int | None = None, advance: Callable[[int], Any] = lambda _: None
) -> Likelihood:
    """Computes the likelihood of a text, in windows of the model's `seq_length`.

    Each token is predicted once, from the earlier tokens of its window: in the first window from its beginning, in each
    further window from at least `seq_length - stride` tokens. The first token of the text is not predicted if the
    tokenizer puts no token before it.

    Args:
        stride: the distance between windows; half of `seq_length` if None.
        advance: is called with the number of new finished tokens.

    Raises:
        ConfigError: the text has fewer than two tokens, the model has no row for a token, or the stride is impossible.
    """
    begin, own = writer.tokenizer.begin_ids, writer.tokenizer.encode(text)
    writer.refuse_missing_rows(begin + own)
    ids = torch.tensor(begin + own, device=writer.model.embedding.weight.device)
    length = writer.model.config.seq_length or len(ids)
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(Problem("stride", stride, f"must be from 1 to seq_length={length}"))
    if len(own) < 2:
        raise ConfigError("the text has fewer than two tokens")
    first = done = max(1, len(begin))
    nats = 0.0
    for start in range(0, len(ids) - 1, stride):
        window = ids[start : start + length + 1]
        new = start + len(window) - done
        logits = writer.model.logits(writer.model.hidden(window[None, :-1])[0, -new:]).float()
        nats += float(F.cross_entropy(logits, window[-new:], reduction="sum"))
        done += new
        advance(new)
        if done == len(ids):
            break
    return Likelihood(nats, done - first, len(text.encode()))
