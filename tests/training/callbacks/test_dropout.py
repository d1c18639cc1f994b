"""What dropout drops is a function of the seed, the step and the micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from fiddlehead.run.directory import RunDirectory

Pretrain = Callable[..., RunDirectory]


def test_dropout_is_that_of_seed_step_and_micro_batch(pretrain: Pretrain) -> None:
    seeds: list[int] = []

    class Seeds(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
            seeds.append(torch.initial_seed())

    pretrain(hidden_dropout=0.1, max_steps=3, micro_batch_size=2, global_batch_size=4, callbacks=[Seeds()])
    assert len(seeds) == 6 == len(set(seeds))
