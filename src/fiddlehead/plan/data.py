"""What a run trains and validates on, as far as it is known before the run starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer

from fiddlehead.data.contents import Contents, Known
from fiddlehead.data.steps import StepDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.numbers import few_digits, is_whole, short


@dataclass(frozen=True)
class DataPlan:
    """The data of a run; None is what cannot be known here."""

    known: Known
    missing: str
    """Why there is no data here; "" if there is."""
    seq_length: int
    model_vocab_size: int
    samples: int
    """How many samples the run trains on: windows, or rows of examples."""
    val_samples: int | None
    """How many samples a validation has, at most if the data is not known; 0 without a validation."""
    val_every: int | None
    """Steps from one validation to the next; None: only at the end."""

    @property
    def tokens(self) -> int | None:
        """Tokens to train on, in all paths."""
        return _sum(each.tokens for each in self.known.train)

    @property
    def examples(self) -> int | None:
        """Examples to train on, in all paths."""
        return _sum(each.examples for each in self.known.train)

    @property
    def epochs(self) -> float | None:
        """How often the run takes each sample; of a blend, each sample of the path that it takes most often."""
        found = [self.epochs_of(each) for each in self.known.train]
        return None if not found or None in found else max(each for each in found if each is not None)

    def epochs_of(self, contents: Contents) -> float | None:
        """How often the run takes each sample of one path; None if that is not known."""
        if contents.share is not None:
            return self.samples * contents.share / contents.samples if contents.samples else None
        found = _sum(each.samples for each in self.known.train)  # they are mixed evenly
        return self.samples / found if found else None

    @property
    def least_epochs(self) -> float | None:
        """At least how many epochs the run makes: a row has one example or more."""
        return self.samples / self.examples if self.examples else None

    @property
    def unknown(self) -> list[str]:
        """What cannot be known here, by name."""
        known = self.known
        if known.endless:
            return []
        packed = self.examples is not None
        named = {
            "its tokens": self.tokens is None and not packed,
            "the tokenizer": not known.tokenizer,
            "its vocabulary": known.vocab_size is None,
            "the epochs": self.epochs is None and not packed,
            "how much there is to validate on": self.val_samples != 0 and not known.val,
        }
        return [name for name, is_unknown in named.items() if is_unknown]

    def lines(self) -> list[str]:
        """The data in sentences for a summary."""
        known = self.known
        lines = [f"none here: {self.missing}"] if self.missing else [self._path(each) for each in known.train]
        if known.packing:
            lines.append(known.packing)
        if self.unknown:
            lines.append(f"not known before: {', '.join(self.unknown)}")
        if known.tokenizer or known.vocab_size is not None:
            of = f"tokenizer: {known.tokenizer}, " if known.tokenizer else "vocabulary of the data: "
            size = "" if known.vocab_size is None else f"{known.vocab_size:,} tokens; "
            lines.append(f"{of}{size}the model has rows for {self.model_vocab_size:,}")
        trained = f"the run takes {short(self.samples)} sequences of {self.seq_length:,}"
        if any(each.share is not None for each in known.train):
            lines.append(trained)
        elif self.epochs is not None:
            lines.append(f"{trained}: {_epochs(self.epochs)} of {_each(known.train)}")
        elif self.least_epochs is not None:
            lines.append(f"{trained}: at least {_epochs(self.least_epochs)}; how many are in a row is not known yet")
        return [*lines, self._validation()]

    def _path(self, contents: Contents) -> str:
        epochs = self.epochs_of(contents)
        if contents.share is None or epochs is None:
            return _said(contents)
        return f"{_said(contents)}; {contents.share:.3g} of the run: {_epochs(epochs)}"

    def _validation(self) -> str:
        if not self.val_samples:
            return "no validation"
        size = f"{self.val_samples:,} sequences, {short(self.val_samples * self.seq_length)} tokens"
        exact = bool(_sum(each.samples for each in self.known.val))
        examples = _sum(each.examples for each in self.known.val)
        of = f" of {examples:,} examples" if examples is not None else ""
        when = f"every {self.val_every:,} steps and at the end" if self.val_every else "at the end"
        return f"validation: {'' if exact else 'at most '}{size}{of}, {when}"

    def to_dict(self) -> dict[str, Any]:
        """The fields and what follows from them, as JSON values."""
        known = asdict(self.known)
        return {
            "paths": known.pop("train"),
            "val_paths": known.pop("val"),
            **known,
            **{name: value for name, value in vars(self).items() if name != "known"},
            **{name: getattr(self, name) for name in ("tokens", "examples", "epochs", "least_epochs", "unknown")},
        }


def data_plan(data: StepDataModule, trainer: Trainer, *, vocab_size: int, data_parallel: int) -> DataPlan:
    """What is known of a run's data.

    Args:
        vocab_size: the model's.
        data_parallel: how many ranks, or groups of them, train on different samples.
    """
    known = data.known()
    windows = _sum(each.samples for each in known.val)
    examples = _sum(each.examples for each in known.val)
    val_samples = data.val_samples
    if windows is not None or examples is not None:  # rows are no more than examples
        val_samples = min(val_samples, windows if windows is not None else examples or 0)
    every = trainer.val_check_interval
    return DataPlan(
        known=known,
        missing=next(iter(ConfigError(data.missing).under("data").problems)) if data.missing else "",
        seq_length=data.seq_length,
        model_vocab_size=vocab_size,
        samples=int(trainer.max_steps) * data.global_batch_size,
        val_samples=val_samples // data_parallel * data_parallel,
        val_every=every if is_whole(every) and every <= trainer.max_steps else None,
    )


def _sum(numbers: Any) -> int | None:
    """The sum; None if one is None, or there is none."""
    given = list(numbers)
    return None if not given or None in given else sum(given)


def _said(contents: Contents) -> str:
    found = []
    if contents.tokens is not None:
        found.append(f"{short(contents.tokens)} tokens")
    if contents.examples is not None:
        found.append(f"{contents.examples:,} examples")
    elif contents.samples is not None:
        found.append(f"{short(contents.samples)} sequences")
    return f"{contents.path}: {', '.join(found)}" if found else contents.path


def _epochs(epochs: float) -> str:
    return f"{few_digits(epochs)} epoch{'' if epochs == 1 else 's'}"


def _each(contents: tuple[Contents, ...]) -> str:
    return "it" if len(contents) == 1 else "each path"
