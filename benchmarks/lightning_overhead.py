"""The overhead of Lightning and our callbacks in a training step, against the same step in a bare PyTorch loop.

The demo recipe trains. After every block of steps a callback stops the clock and trains a copy of the model for the
same number of steps by hand, with the same data loader, optimizer, schedule and clipping. A block logs one line, as the
recipe does. Validation and checkpoints are left out on both sides, because they are not overhead.

A second row does the same with a nearly empty model: there the difference is the overhead itself, without the noise of
the computation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import Spread, ratio, save, table

from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny
from fiddlehead.tasks import pretrain

BLOCK = 10


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30, help=f"blocks of {BLOCK} steps on either side")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows, figures = [], {"threads": arguments.threads, "blocks": arguments.blocks, "steps_per_block": BLOCK}
    for name, recipe in {"tiny": tiny(), "next to nothing": hollow()}.items():
        lightning, bare = measure(recipe, arguments.blocks)
        added = Spread.of(1000 * (a - b) for a, b in zip(lightning, bare, strict=True))
        spreads = [Spread.of(1000 * value for value in values) for values in (lightning, bare)]
        relative = ratio(lightning, bare)
        rows.append([name, *(f"{spread:.2f}" for spread in spreads), f"{added:.2f}", f"{relative:.3f}"])
        figures[name] = {
            "lightning_ms": spreads[0],
            "bare_ms": spreads[1],
            "added_ms": added,
            "lightning_over_bare": relative,
        }
    print(table(["model", "Lightning, ms a step", "bare, ms a step", "added, ms a step", "Lightning / bare"], rows))
    save("lightning_overhead", figures, ["torch", "lightning"])


def hollow() -> Recipe:
    """The demo recipe with a model and batches that cost next to nothing."""
    recipe = tiny()
    config = recipe.model.config
    config.num_layers, config.hidden_size, config.ffn_hidden_size = 1, 16, 16
    recipe.data.seq_length = 8
    recipe.data.micro_batch_size = recipe.data.global_batch_size = 1
    return recipe


def measure(recipe: Recipe, blocks: int) -> tuple[list[float], list[float]]:
    """Seconds a step of each block: under Lightning, and by hand."""
    recipe.trainer.max_steps = (blocks + 1) * BLOCK  # the first block warms up
    recipe.trainer.log_every_n_steps = BLOCK
    recipe.data.val_samples = 0
    recipe.optim.lr_scheduler.warmup_steps = 0
    recipe.checkpoint.every_n_steps = recipe.trainer.max_steps
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        recipe.log.dir, recipe.log.name = directory, "run"
        arguments = recipe.build_arguments()
        alternation = Alternation()
        arguments["trainer"].callbacks.insert(0, alternation)
        pretrain(**arguments)
    return alternation.lightning[1:], alternation.bare[1:]


class Alternation(Callback):
    """Trains a copy of the model by hand after every block of steps, and times both."""

    def __init__(self) -> None:
        self.lightning: list[float] = []
        self.bare: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies what the bare loop trains with."""
        module: Any = pl_module
        self.model = copy.deepcopy(module.transformer)
        built = module.optim.build(self.model.named_parameters(), trainer.max_steps)
        self.optimizer, self.schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
        self.batches = iter(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        assert trainer.gradient_clip_val is not None, "the demo recipe clips"
        self.clip = float(trainer.gradient_clip_val)
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a block of Lightning's and runs one by hand; the other callbacks' work counts to the next block."""
        if trainer.global_step % BLOCK:
            return
        now = time.perf_counter()
        self.lightning.append((now - self.start) / BLOCK)
        losses = [self.step() for _ in range(BLOCK)]
        print(f"loss {float(losses[-1]):.4f}")
        self.start = time.perf_counter()
        self.bare.append((self.start - now) / BLOCK)

    def step(self) -> torch.Tensor:
        """One step as a short script would write it."""
        batch = next(self.batches)
        loss = F.cross_entropy(self.model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach()


if __name__ == "__main__":
    main()
