"""Shows an answer of the model during training."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.checkpoints.sharding import is_sharded
from fiddlehead.data.fine_tuning import FineTuningDataModule
from fiddlehead.inference.generation import sample
from fiddlehead.run.console import say


class SampleAnswer(Callback):
    """After each validation, prints the model's answer to the first validation example.

    Args:
        max_new_tokens: the longest answer.
    """

    def __init__(self, max_new_tokens: int = 48) -> None:
        self.max_new_tokens = max_new_tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates the answer: on the first rank, or on all ranks together if each has a shard of the model."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.transformer
        sharded = is_sharded(model)
        if trainer.sanity_checking or not isinstance(data, FineTuningDataModule):
            return
        if model.split.parts > 1 or len(model.layers) < model.config.num_layers:
            return  # ranks that share a sequence, or have different layers, cannot generate
        prompt = data.first_question()
        if not prompt or not (sharded or trainer.is_global_zero):
            return
        if sharded:
            model.unshard()  # sampling reads parameters outside the layers
        tokenizer: Any = data.tokenizer
        banned = tuple(tokenizer.ids_without_token(model.config.vocab_size))
        answer = sample(model, prompt, self.max_new_tokens, temperature=0, banned=banned)
        ends = tokenizer.stop_ids
        # Ranks that answer together must all continue to the end: each needs the others' shards.
        tokens = list(takewhile(lambda token: token not in ends, list(answer) if sharded else answer))
        if sharded:
            model.reshard()
        asked, answered = (tokenizer.decode(ids) for ids in (prompt, tokens))
        say(f"step {trainer.global_step:>6}  asked {_short(asked)!r}, it answers {_short(answered)!r}")


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:40]} ... {text[-75:]}"
