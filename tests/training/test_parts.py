"""Parts that training cannot use: the attributes that each lacks are named."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule

from fiddlehead.data.random_tokens import RandomTokens
from fiddlehead.errors import ConfigError
from fiddlehead.training import AdamW, Muon
from fiddlehead.training.optim import Optim
from tests.training.conftest import plan_of


class NoBytes(Optim):
    """Says nothing of its memory."""

    def optimizer(self, named_parameters: Any, fused: Any = None) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for _, parameter in named_parameters], lr=self.lr)


class Plain(LightningDataModule):
    """Lightning's, with some of what is needed."""

    seq_length = micro_batch_size = global_batch_size = 8


def plan(parts: Any, **others: Any) -> Any:
    made = parts() | others
    return plan_of(made)


SGD = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        ("optim", SGD, "optim: is a torch.optim.sgd.SGD, which lacks lr, lr_scheduler, kind, build,"),
        (
            "optim",
            functools.partial(torch.optim.AdamW, lr=1.0),
            r"optim: is a partial of torch\.optim\.adamw\.AdamW, which",
        ),
        ("optim", None, "optim: is a builtins.NoneType, which lacks"),
        (
            "optim",
            NoBytes(),
            r"optim: is a .*\.NoBytes, which lacks state_bytes; derive it from fiddlehead.training.optim:Optim",
        ),
        ("optim", Optim(), "which lacks optimizer, state_bytes;"),
        (
            "data",
            Plain(),
            r"data: is a .*\.Plain, which lacks val_samples, separate_documents, token_bytes, vocab_size",
        ),
        ("data", [1, 2], "data: is a builtins.list; must be a LightningDataModule"),
        ("model", LightningModule(), "model: is a .*LightningModule; must be a LanguageModel"),
        ("trainer", 3, "trainer: is a builtins.int; must be Lightning's Trainer"),
    ],
)
def test_a_part_of_another_kind_is_named_with_what_it_lacks(parts: Any, name: str, part: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        plan(parts, **{name: part})


def test_all_parts_of_other_kinds_are_named_at_once(parts: Any) -> None:
    with pytest.raises(ConfigError) as error:
        plan(parts, model=None, data=None, trainer=None, optim=None)
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["model", "trainer", "data", "optim"]


@pytest.mark.parametrize("optim", [AdamW(), Muon()])
def test_the_parts_that_are_here_lack_nothing(parts: Any, optim: Optim) -> None:
    assert plan(parts, optim=optim, data=RandomTokens(64, 16, 4, 4)).parameters
