"""Direct preference optimization (Rafailov et al. 2023): makes the better of two answers more likely."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fiddlehead.data.documents import NO_LABEL
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.models.collectives import all_reduce
from fiddlehead.models.lora import without_adapters
from fiddlehead.models.mlp_choice import MlpBackend
from fiddlehead.models.places import documents_of
from fiddlehead.models.speed import fuse_mlp
from fiddlehead.numbers import is_number
from fiddlehead.recipe.from_task import from_task
from fiddlehead.recipe.resumable import Resumable
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.language_model import LanguageModel
from fiddlehead.training.optim import Optim


class PreferenceModel(LanguageModel):
    """A transformer that is trained on pairs of answers, of which one is better.

    The reference is the model at the beginning. With adapters it takes no memory, because the weights below them do not
    change; without adapters, the weights are held twice.

    Args:
        beta: the weight of the difference from the reference; with a larger beta, the model stays closer to it.
        mlp_backend: as in `LanguageModel`.
    """

    VALIDATION: ClassVar = ("val_loss", "val_accuracy")

    @from_task("optim")
    def __init__(
        self,
        config: TransformerConfig | None = None,
        init_from: str | Path | None = None,
        lora: LoRA | None = None,
        beta: float = 0.1,
        *,
        mlp_backend: Resumable[MlpBackend] = "auto",
        optim: Optim | None = None,
    ) -> None:
        if not (is_number(beta) and beta > 0):
            raise ConfigError(Problem("beta", beta, "must be a finite number above 0"))
        super().__init__(config, init_from, lora, mlp_backend=mlp_backend, optim=optim)
        self.beta = beta
        self._reference: list[Transformer] = []  # in a list, so that it is not part of the module

    def _needs_weights(self) -> str:
        """As in `LanguageModel`; preferences always need a model, which is the reference."""
        return "name a model that can answer already, to learn preferences"

    def problems(self, precision: str, sizes: Sizes) -> list[Problem]:
        """As `LanguageModel.problems`."""
        problems = super().problems(precision, sizes)
        if sizes.pipeline > 1:
            message = "the reference would need stages of its own, whose results reach only the last one"
            problems.append(Problem("trainer.strategy.pipeline_parallel", sizes.pipeline, message, (1,)))
        return problems

    def on_fit_start(self) -> None:
        """Also makes the reference, if it is a separate model."""
        super().on_fit_start()
        if self.lora is None:
            with self.trainer.precision_plugin.module_init_context():  # as Lightning makes the model
                alike = partial(fuse_mlp, backend=self.mlp.backend)  # so that both round alike
                reference = self.initial.transformer(self.config, None, self._parallel, alike)
            self._reference = [reference.to(self.device).requires_grad_(False).eval()]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """The mean of -log sigmoid(beta x the change of the difference between the two answers' log-probabilities).

        It is the mean over all pairs of the step, on all micro-batches and ranks. The balancing loss of a mixture is
        added; it counts the tokens of both answers and their prompts.
        """
        batch = self._own_tokens(batch)
        divisors = self._divisors(batch, batch_idx)
        with self._training_weights():
            loss = self._preference(batch)[0].sum() / divisors.pairs
        self._note_loss(loss.detach())
        return self._with_balance(loss, divisors)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds one batch to the sums: the loss, the pairs, and the pairs in the right order."""
        losses, margin = self._preference(self._own_tokens(batch))
        self._validation += torch.stack([losses.sum(), torch.ones_like(losses).sum(), (margin > 0).sum()])

    def on_validation_epoch_end(self) -> None:
        """Logs `val_loss` and `val_accuracy`, the share of pairs whose better answer gained more."""
        if self.trainer.sanity_checking:
            return
        total = self.trainer.strategy.reduce(self._validation, reduce_op="sum")
        loss, pairs, right = total.tolist()  # type: ignore[union-attr]
        self._log_validation({"val_loss": loss / pairs, "val_accuracy": right / pairs})

    def _preference(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each pair, the loss and the better answer's advantage in gained log-probability, (pairs,) each."""
        with torch.no_grad():
            if self._reference:
                before = answer_log_probabilities(self._reference[0], batch)[batch["pairs"]]
            else:
                with without_adapters(self.transformer):
                    before = answer_log_probabilities(self.transformer, batch)[batch["pairs"]]
        now = answer_log_probabilities(self.transformer, batch)[batch["pairs"]]
        gained = now - before
        margin = self.beta * (gained[:, 0] - gained[:, 1])
        return -F.logsigmoid(margin), margin.detach()


def answer_log_probabilities(transformer: Transformer, batch: dict[str, Any]) -> torch.Tensor:
    """The log-probability of the labels of each document, (documents,) float32.

    The documents are whole, also where processes share the sequences; each of these processes gets the result.
    """
    split = transformer.split
    labels, cu_seqlens = batch["labels"].flatten(), batch["cu_seqlens"]
    logits = transformer(batch["input_ids"], cu_seqlens, batch["max_seqlen"], padding=batch.get("padding"))
    nats = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none", ignore_index=NO_LABEL)
    document = documents_of(cu_seqlens, split.parts * labels.numel()).view(len(batch["labels"]), -1)
    sums = torch.zeros(len(cu_seqlens) - 1, device=nats.device, dtype=nats.dtype).index_add(
        0, split.own(document).flatten(), -nats
    )
    for group in (split.cp, split.tp):
        sums = all_reduce(sums, group) if group.size > 1 else sums
    return sums
