"""The Lightning data module for fine-tuning: examples with answers, packed into rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.checksums import Checksums, of_paths
from fiddlehead.data.contents import Contents, Known
from fiddlehead.data.examples import NO_TEMPLATE, Example, tokenize_records
from fiddlehead.data.prompt_template import PromptTemplate
from fiddlehead.data.records import Record, read_records
from fiddlehead.data.rows import Rows
from fiddlehead.data.steps import StepDataModule, opened
from fiddlehead.data.tokenizers import TokenizerFile, no_row
from fiddlehead.errors import ConfigError, Problem, first_of, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.numbers import is_number
from fiddlehead.recipe.resumable import Resumable


class FineTuningDataModule(StepDataModule):
    """Rows of `seq_length` tokens, made of whole examples; only the answers are to be predicted.

    `paths` are files of JSON lines, JSON arrays (both also with `.gz` or `.zst`) or Parquet, or folders that `datasets`
    saved to disk, or NeMo's folders: training.jsonl is trained on, validation.jsonl validated on (unless there are
    `val_paths`), and test.jsonl left alone. An example is a conversation, which the tokenizer's chat template turns
    into text, or a prompt and a completion, which are text as they are, ended by the end-of-document token;
    docs/finetune.md lists the fields of all accepted shapes. `prompt_template`, such as "Question: {question} Answer:
    {answer}", makes the text of other fields; the last one is the answer. None is "{input} {output}" in NeMo's folders,
    as there. With `preference` an example is a prompt, a `chosen` and a `rejected` answer, text or messages. If the
    template writes an answer otherwise once more messages follow, each answer of a conversation has a text of its own.

    With `packed` as many examples as fit share a row, and attention keeps them apart, so that each is as if it were
    alone; without, each has a row of its own, padded. An example of more tokens is cut there, each answer of a pair at
    half of it; one of which no answer is left is dropped; how many is said. Validation is on `val_paths`, or else on
    every n-th example, as `val_fraction` asks, which are then not trained on.

    A checkpoint keeps the files' checksums, and a run goes on with other files only with `allow_changed`.

    `tokenizer` is a folder with a `tokenizer.json`; None is that of the model to begin with, `default_tokenizer`.

    A batch is as pretraining's with documents kept apart, `index` are rows, and `padding`, (micro_batch_size,
    seq_length) bool, says which tokens only fill a row. With `preference` it also has `pairs`,
    (pairs, 2) int64: the numbers of the documents, in `cu_seqlens`, that are the better and the worse answer.
    """

    separate_documents = True

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path] = (),
        val_paths: str | Path | Sequence[str | Path] = (),
        val_fraction: float = 0.05,
        tokenizer: str | Path | None = None,
        seq_length: int = 2048,
        micro_batch_size: Resumable[int] = 1,
        global_batch_size: int = 8,
        packed: bool = True,
        preference: bool = False,
        val_samples: int = 256,
        num_workers: Resumable[int] = 0,
        seed: int = 1234,
        allow_changed: bool = False,
        prompt_template: str | None = None,
    ) -> None:
        problems = []
        if not (is_number(val_fraction) and 0 <= val_fraction < 1):
            problems.append(Problem("val_fraction", val_fraction, "must be at least 0 and below 1"))
        self.template: PromptTemplate | None = None
        if prompt_template is not None and preference:
            problems.append(Problem("prompt_template", prompt_template, "pairs of answers have none"))
        elif prompt_template is not None:
            try:
                self.template = PromptTemplate(prompt_template)
            except ConfigError as error:
                problems += error.problems
        super().__init__(
            seq_length, micro_batch_size, global_batch_size, val_samples, num_workers, seed, problems=problems
        )
        self.paths, self.val_paths, self.val_fraction = _listed(paths), _listed(val_paths), val_fraction
        self.packed, self.preference = packed, preference
        self.given_tokenizer = tokenizer
        self.allow_changed = allow_changed
        self.default_tokenizer: Path | None = None
        """The folder with the tokenizer of the model to begin with."""
        self._records: tuple[list[Record], list[Record]] | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is known: one of its own, or that of the model to begin with."""
        return bool(self.given_tokenizer or self.default_tokenizer)

    @property
    def vocab_size(self) -> int:
        """The number of different tokens. It reads and checks the examples at hand first, and names every wrong one."""
        if self._tokenizer is not None:
            return self._tokenizer.vocab_size
        if not self.missing:
            self._refuse_chats_without_template()
        return self._open_tokenizer().vocab_size

    def _refuse_chats_without_template(self) -> None:
        """Raises `ConfigError` for the first conversation, if nothing says how it becomes text."""
        chat = next((record for split in self._read() for record in split if record.is_chat), None)
        if chat is not None and ChatTemplate.load(self._tokenizer_folder()) is None:
            raise ConfigError(Problem.in_file(chat.where, NO_TEMPLATE))

    @property
    def missing(self) -> str:
        """As in the base: `paths` is empty, or a path is not on this machine."""
        if not self.paths:
            return Problem("paths", message="is empty; give JSONL or Parquet files with examples")
        for name in ("paths", "val_paths"):
            for path in getattr(self, name):
                if not path.exists():
                    return Problem(name, str(path), "there is no such file or folder")
        return ""

    def known(self) -> Known:
        """As in the base: the number of examples, and of rows if each example has its own."""
        tokenizer = (self._tokenizer or self._open_tokenizer()) if self.has_tokenizer else None
        kind = "pairs of answers" if self.preference else "examples"
        packing = f"{kind} packed into rows" if self.packed else f"a padded row for each of the {kind}"
        about = {
            "tokenizer": "" if tokenizer is None else str(self._tokenizer_folder()),
            "vocab_size": None if tokenizer is None else tokenizer.vocab_size,
            "packing": packing,
            "pairs": self.preference,
        }
        if self.missing:
            return Known(**about)
        train, val = self._read()
        splits = self._contents(self.paths, train), self._contents(self.val_paths or self.paths, val)
        return Known(*splits, **about)

    def num_samples(self, split: Literal["train", "val"]) -> int | None:
        """As in the base: the number of examples; None with `packed`, before rows are made of them."""
        return None if self.packed or self.missing else len(self._read()[split == "val"])

    def _contents(self, paths: Sequence[Path], records: Sequence[Record]) -> tuple[Contents, ...]:
        """The examples that come from each of the paths; those of one split."""
        counts = {path: sum(record.where.startswith((f"{path}:", f"{path}/")) for record in records) for path in paths}
        return tuple(
            Contents(str(path), examples=count, samples=None if self.packed else count)
            for path, count in counts.items()
        )

    def checksums(self) -> Checksums:
        """The checksums of the files of `paths` and `val_paths`; in NeMo's folders, of those that are read."""
        return {"paths": of_paths(self._training_files()), "val_paths": of_paths(self._validation_files())}

    def missing_rows(self, vocab_size: int) -> list[str]:
        """As in the base; before the examples are tokenized, only for the token that ends answers and pads rows."""
        tokenizer = self._tokenizer or self._open_tokenizer()
        if tokenizer.eos_id < vocab_size:
            return []
        return [f"the end of an answer is {no_row(tokenizer, tokenizer.eos_id, vocab_size)}"]

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenizes the examples; raises `ConfigError` with the problems of all."""
        if not self.val_samples and self.trainer is not None:
            self.trainer.limit_val_batches = 0  # else Lightning warns that there are no batches
        if self._train is not None:
            return
        tokenizer = self._open_tokenizer()
        template = ChatTemplate.load(self._tokenizer_folder())
        first_rank = self.trainer is None or self.trainer.is_global_zero
        self.refuse_missing_rows()
        train, val = (
            Rows(
                self._tokenize(records, tokenizer, template, progress=first_rank),
                self.seq_length,
                tokenizer.eos_id,
                packed=self.packed,
            )
            for records in self._read()
        )
        if not len(train):
            raise ConfigError(Problem("seq_length", self.seq_length, "is too short for any answer"))
        if not len(val):
            self.val_samples = 0
            if self.trainer is not None:
                self.trainer.limit_val_batches = 0
        if first_rank:
            print(f"examples: {train}" + (f"; for validation {val}" if len(val) else ""), flush=True)  # noqa: T201
        self._train, self._val, self._tokenizer = train, val, tokenizer
        self._records = None  # the texts take more memory than their tokens
        lengths = tokenizer.token_bytes()
        self.token_bytes = None if lengths is None else torch.from_numpy(lengths)

    def first_question(self) -> list[int]:
        """The tokens before the first validation answer; empty without a validation."""
        if not self._val:
            return []
        text = opened(self._val).examples[0][0]  # pyright: ignore[reportAttributeAccessIssue]
        return text.ids[: int(text.learned.argmax())].tolist()

    def _tokenize(
        self, records: Sequence[Record], tokenizer: TokenizerFile, template: ChatTemplate | None, *, progress: bool
    ) -> list[tuple[Example, ...]]:
        """The records as tokens; every token has a row in the model."""
        examples = tokenize_records(records, tokenizer, template, progress=progress)
        rows = self.model_vocab_size
        if rows is None or tokenizer.vocab_size <= rows:
            return examples
        problems = []
        for record, texts in zip(records, examples, strict=True):
            beyond = sorted({int(i) for text in texts for i in text.ids[text.ids >= rows]})
            problems += [Problem.in_file(record.where, f"has {no_row(tokenizer, i, rows)}") for i in beyond]
        refuse(first_of(problems))
        return examples

    def _tokenizer_folder(self) -> Path:
        folder = self.given_tokenizer or self.default_tokenizer
        if folder is None:
            message = "the model to begin with has no tokenizer either; give a folder with one"
            raise ConfigError(Problem("tokenizer", None, message))
        path = user_path(folder)
        return path if path.is_dir() else path.parent

    def _open_tokenizer(self) -> TokenizerFile:
        return TokenizerFile(self._tokenizer_folder())

    def _training_files(self) -> list[Path]:
        return [_nemo_file(path, "training") or path for path in self.paths]

    def _validation_files(self) -> list[Path]:
        if self.val_paths:
            return [_nemo_file(path, "validation") or path for path in self.val_paths]
        return [file for path in self.paths if (file := _nemo_file(path, "validation"))]

    def _read(self) -> tuple[list[Record], list[Record]]:
        """The examples to train on, and those to validate on."""
        if self._records is None:
            files, val_files = self._training_files(), self._validation_files()
            nemo = {*files, *val_files} - {*self.paths, *self.val_paths}
            train, val = (
                read_records(each, preference=self.preference, template=self.template, nemo=nemo) if each else []
                for each in (files, val_files)
            )
            if not val and self.val_fraction and self.val_samples:
                every = max(2, round(1 / self.val_fraction))
                val = train[every - 1 :: every]
                train = [record for number, record in enumerate(train, start=1) if number % every]
            self._records = train, val
        return self._records


def _nemo_file(folder: Path, part: str) -> Path | None:
    """The file of a part of a folder of NeMo, "training", "validation" or "test"; None if it has none."""
    file = folder / f"{part}.jsonl"
    return file if file.is_file() and not (folder / "state.json").exists() else None


def _listed(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    return [user_path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
