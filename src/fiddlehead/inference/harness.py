"""Evaluates our models on tasks of lm-evaluation-harness (EleutherAI); needs the extra `eval`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.inference.generation import Sampling
from fiddlehead.inference.text import Writer

logger = logging.getLogger(__name__)

_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Tasks:
    """Tasks that the harness knows."""

    names: list[str]
    manager: TaskManager


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Tasks:
    """Finds tasks, groups or tags by name; names may have wildcards.

    Args:
        folder: has additional tasks, as YAML files; their relative `data_files` are relative to the working directory.

    Raises:
        ConfigError: there is no such folder or task.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(Problem("tasks_dir", folder, "there is no such folder"))
    problems: list[Problem] = []
    # The harness's own tasks are thousands of files, and looked through only if need be.
    for defaults in (False, True) if folder else (True,):
        manager = TaskManager(include_path=os.fspath(folder) if folder else None, include_defaults=defaults)
        found = {name: [each for each in manager.all_tasks if fnmatchcase(each, name)] for name in names}
        missing = [name for name, matches in found.items() if not matches]
        if not missing:
            return Tasks(list(dict.fromkeys(each for matches in found.values() for each in matches)), manager)
        problems = [_unknown(name, manager.all_tasks) for name in missing]
    raise ConfigError(*problems)


def evaluate_tasks(
    writer: Writer, tasks: Tasks, *, limit: int | None = None, num_fewshot: int | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """Runs lm-evaluation-harness; returns what its `simple_evaluate` does: `results`, `versions`, `n-shot` etc.

    Args:
        limit: the most documents of each task; None: all.
        num_fewshot: the number of solved examples before each document; None: as the task says.

    Raises:
        ConfigError: a task's data cannot be read, or the model cannot do what a task needs.
    """
    try:
        loaded = tasks.manager.load(tasks.names)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:  # whatever reading a task's data raises
        message = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(Problem("tasks", ",".join(tasks.names), f"cannot be loaded: {message[0]}")) from error
    fixed = [name for name, task in loaded["tasks"].items() if task.get_config("num_fewshot") == 0]
    if num_fewshot and fixed:  # the harness leaves them as they are
        logger.warning("num_fewshot=%d: %s say num_fewshot: 0, which holds", num_fewshot, ", ".join(fixed))
    evaluate: Any = simple_evaluate  # whose decorator hides its parameters
    return evaluate(
        HarnessModel(writer, batch_size),
        tasks=tasks.names if loaded.get("groups") else [*loaded["tasks"].values()],  # a group has a score of its own
        task_manager=tasks.manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
    )


class HarnessModel(TemplateLM):
    """Lets lm-evaluation-harness use a model and its tokenizer.

    Texts are encoded as by the harness's own `hf` model: with the tokenizer's tokens at the beginning, and names of
    special tokens become these tokens.
    """

    def __init__(self, writer: Writer, batch_size: int = 16) -> None:
        super().__init__()
        self.writer = writer
        self._device: Any = writer.model.embedding.weight.device
        self.batch_size = batch_size
        self.max_length = writer.model.config.seq_length or sys.maxsize
        self._begin = writer.tokenizer.special.names.get("bos_token")

    @property
    def eot_token_id(self) -> int:
        return self.writer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = self.writer.tokenizer.id_of("bos_token")
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids; with None, the tokenizer's first tokens are added unless the text has them already."""
        if add_special_tokens is None:
            add_special_tokens = not (self._begin and string.startswith(self._begin))
        return self.writer.tokenizer.encode_with_special(string, complete=add_special_tokens)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether each of its tokens is the most likely one.

        Continuations of one token after the same context, such as the letters of a multiple choice, share a forward
        pass.
        """
        same: dict[tuple[tuple[int, ...], int], list[int]] = {}
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                allowed = f"1 to seq_length={self.max_length}"
                raise ConfigError(f"a continuation has {len(continuation)} tokens, and must have {allowed}")
            self.writer.refuse_missing_rows(context + continuation)
            ids = (context + continuation)[-self.max_length - 1 :]
            cut += len(ids) < len(context) + len(continuation)
            same.setdefault((tuple(ids[:-1]), len(continuation)), []).append(number)
        if cut:
            logger.warning("%d of %d texts are longer than seq_length: their beginning is cut", cut, len(requests))
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(same, key=lambda each: -len(each[0]))
        with tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm or None) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for each, log_probabilities in zip(batch, self._predictions(batch), strict=True):
                    likeliest = log_probabilities.argmax(dim=-1)
                    for number in same[each]:
                        ids = torch.tensor(requests[number][2], device=self._device)
                        nats = log_probabilities.gather(-1, ids[:, None]).sum()
                        found[number] = float(nats), bool((likeliest == ids).all())
                    bar.update(len(same[each]))
        return [found[number] for number in range(len(requests))]

    def _predictions(self, batch: Sequence[tuple[tuple[int, ...], int]]) -> Iterator[torch.Tensor]:
        """Yields for each text the log probabilities, (N, V), of the tokens after each of its last N tokens."""
        longest = max(len(ids) for ids, _ in batch)
        padded = [[*ids, *[0] * (longest - len(ids))] for ids, _ in batch]  # on the right, which nothing else sees
        lengths = torch.tensor([len(ids) for ids, _ in batch], device=self._device)
        hidden = self.writer.model.hidden(torch.tensor(padded, device=self._device), new_lengths=lengths)
        for row, (ids, count) in zip(hidden, batch, strict=True):
            yield self.writer.model.logits(row[len(ids) - count : len(ids)]).float().log_softmax(dim=-1)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length`."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            # The window is at most the text: the harness counts with it, and a model may have no limit.
            size = min(self.max_length, max(len(ids), 1))
            for window in get_rolling_token_windows(ids, self.prefix_token_id, size, context_len=1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to one of its stop texts; without a temperature, the most likely tokens."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm or None) as bar:
            for options, numbers in alike.items():
                contexts = [requests[number].args[0] for number in numbers]
                texts |= zip(numbers, self._generate(contexts, json.loads(options), numbers, bar), strict=True)
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: list[str], options: dict[str, Any], seeds: list[int], bar: Any) -> list[str]:
        options = dict(normalize_gen_kwargs(options))
        refuse(
            Problem(f"generation_kwargs.{name}", message="is not supported", allowed=_GENERATION)
            for name in options.keys() - set(_GENERATION)
        )
        new, temperature = options["max_gen_toks"], options.get("temperature") or 0.0
        if new >= self.max_length:
            raise ConfigError(Problem("max_gen_toks", new, f"must be below the model's seq_length={self.max_length}"))
        if options.get("do_sample") and "temperature" not in options:
            temperature = 1.0
        eos = self.writer.tokenizer.eos_token
        stop = handle_stop_sequences(options["until"], eos=eos)
        sampling = Sampling(
            temperature=temperature if options.get("do_sample") else 0.0,
            top_k=options.get("top_k") or 0,
            top_p=options.get("top_p") or 1.0,
        )
        prompts = [self.tok_encode(context)[new - self.max_length :] for context in contexts]
        prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
        # Each request draws with a seed of its own: some tasks ask for several answers to one question.
        written = self.writer.complete(
            prompts, new, stop=stop, sampling=sampling, seeds=seeds, batch_size=self.batch_size, advance=bar.update
        )
        decode = self.writer.tokenizer.decode
        return [postprocess_generated_text(decode(each.ids), stop, None) for each in written]


def _unknown(name: str, known: Sequence[str]) -> Problem:
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm-eval ls tasks` lists them"
    return Problem("tasks", name, f"unknown task; {hint}")
