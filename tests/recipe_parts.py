"""Small classes and functions for recipes to configure; postponed annotations, as in most code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path
from subprocess import run as run_program  # a name that only passes through this module
from typing import TYPE_CHECKING, Annotated, Any, Literal

import fiddle as fdl
import torch
from pydantic import Field

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe import Recipe

if TYPE_CHECKING:
    from decimal import Decimal

__all__ = ["run_program"]


class Color(Enum):
    RED = "r"
    BLUE = "b"


@dataclass
class ModelConfig:
    num_layers: int = 2
    num_attention_heads: int = 8
    num_query_groups: int | None = None
    activation: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None
    dtype_or_name: torch.dtype | str = "auto"
    color: Color = Color.RED
    kind: type[torch.nn.Module] = torch.nn.Linear
    extra: dict[str, int] | None = None
    dropout: float = 0.0
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_query_groups and self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                Problem("num_query_groups", self.num_query_groups, f"does not divide {self.num_attention_heads}")
            )
        if self.num_layers < 1:
            raise ValueError("too few layers")


class Tokenizer:
    def __init__(self, path: Path | None = None):
        self.path = path

    @classmethod
    def from_name(cls, name: str) -> Tokenizer:
        return cls(Path(name))

    def read(self, name: str) -> str:
        return name


class Model:
    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None):
        self.config = config
        self.tokenizer = tokenizer


class Data:
    def __init__(self, tokenizer: Tokenizer | None = None, paths: Sequence[str] = (), weights: tuple[float, ...] = ()):
        self.tokenizer = tokenizer
        self.paths = paths
        self.weights = weights


class Optim:
    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), *, eps: float = 1e-8):
        self.lr = lr
        self.betas = betas


class Strategy:
    def __init__(self, shards: int = 1):
        self.shards = shards


class Log:
    def __init__(self, name: str = "run", tag: str | None = None, every: int = 10, quiet: bool = False, note=None):
        self.name = name


class Odd:
    """Everything unusual at once."""

    def __init__(
        self,
        interval: int | float | str = 1,
        share: float | int | None = None,
        wait: timedelta | None = None,
        positive: Annotated[int, Field(gt=0)] = 1,
        level: Literal["low", "high", 3] = "low",
        amount: Decimal = None,  # type: ignore[assignment]  # noqa: RUF013 | the name is for type checkers only
        path: Path = Path("runs"),
        strategy: Strategy | str = "auto",
        parts: list[Optim] | None = None,
        either: bool | int | None = None,
        implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013 | as older code spells an optional
        anything: Any = None,
    ):
        pass


def positional(a, /, b, *rest, c=1, **others):
    return (a, b, rest, c, others)


def pretrain(
    model: Model | None = None,
    data: Data | None = None,
    optim: Optim | None = None,
    log: Log | None = None,
    odd: Odd | None = None,
    loss: Callable[..., Any] | None = None,
    run_name: str = "first",
    seed: int = 1,
    anything: Any = None,
) -> None:
    """The task; it writes down what it got, so that a test sees that it ran."""
    if isinstance(anything, Path):
        assert optim is not None
        anything.write_text(f"{run_name} {optim.lr}")


def report(optim: Optim, out: str) -> None:
    Path(out).write_text(f"lr={optim.lr}")


def tiny(num_layers: int = 1, dtype: torch.dtype | None = None) -> fdl.Config[Model]:
    return fdl.Config(Model, config=fdl.Config(ModelConfig, num_layers=num_layers, dtype=dtype))


def wsd(lr: float = 1e-3) -> fdl.Config[Optim]:
    return fdl.Config(Optim, lr=lr)


def broken() -> int:
    return 3


def whole() -> Recipe:
    return Recipe(pretrain)


def recipe() -> Recipe:
    """A recipe with a shared configuration."""
    tokenizer = fdl.Config(Tokenizer, path=Path("vocab"))
    return Recipe(
        pretrain,
        model=fdl.Config(Model, config=fdl.Config(ModelConfig, num_layers=4), tokenizer=tokenizer),
        data=fdl.Config(Data, tokenizer=tokenizer, paths=["a", "b"]),
        optim=fdl.Config(Optim, lr=3e-4),
        log=fdl.Config(Log),
        odd=fdl.Config(Odd),
        loss=fdl.Partial(torch.nn.functional.silu, inplace=True),
        anything=functools.partial(torch.nn.functional.silu, inplace=False),
    )
