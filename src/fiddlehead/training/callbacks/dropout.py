"""Dropout that depends only on the seed, the step and the rank."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


class SeedDropout(Callback):
    """Seeds the random numbers of each micro-batch of a model with dropout, so that a resumed run drops the same."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The batch is on the device."""
        config, lora = pl_module.config, pl_module.lora
        if config.hidden_dropout or config.attention_dropout or (lora and lora.dropout):
            micro_batch = batch_idx % trainer.accumulate_grad_batches  # a resumed run counts batches from 0
            # The data-parallel rank, because ranks that share a layer must drop the same.
            rank = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
            seed = hash((self.seed, trainer.global_step, micro_batch, rank)) % 2**63
            torch.manual_seed(seed)
            if pl_module.computation.compile != "model":  # a generator cannot be seeded inside what is compiled
                pl_module.transformer.dropout_seed = seed
