"""Muon against AdamW: the losses of one model, on the same batches, over as many steps.

A GQA model of 19 M parameters learns Python's standard library, with each optimizer at several rates.

    python benchmarks/muon.py            trains, and draws docs/muon.png
    python benchmarks/muon.py --draw     draws the picture again from the results
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import fiddle as fdl
import torch
from measure import RESULTS, picture, save, save_picture, table

from fiddlehead.data import BPETokenizer
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny
from fiddlehead.tasks import pretrain
from fiddlehead.training import Muon

RATES = {"AdamW": (2.5e-4, 5e-4, 1e-3), "Muon": (2e-3, 4e-3, 8e-3)}
PICTURE = Path(__file__).parents[1] / "docs" / "muon.png"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8, help="in a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="only draw the picture")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads((RESULTS / "muon.json").read_text()))
        return
    torch.set_num_threads(arguments.threads)

    figures: dict[str, Any] = {
        "steps": arguments.steps,
        "tokens_per_step": 128 * arguments.sequences,
        "threads": arguments.threads,
        "runs": {name: {} for name in RATES},
    }
    for name, runs in figures["runs"].items():
        for rate in RATES[name]:
            runs[f"{rate:g}"] = train(name, rate, arguments.steps, arguments.sequences)
    save("muon", figures, ["torch"])
    draw(json.loads((RESULTS / "muon.json").read_text()))
    rows = [
        [name, rate, f"{last(run):.3f}", f"{run['seconds_per_step']:.2f}"]
        for name, runs in figures["runs"].items()
        for rate, run in runs.items()
    ]
    print(table(["optimizer", "rate", "validation loss", "seconds a step"], rows))


def last(run: dict[str, Any]) -> float:
    """The validation loss at the end of a run."""
    return float(run["val_loss"][-1][1])


def train(name: str, rate: float, steps: int, sequences: int, validations: int = 8) -> dict[str, Any]:
    """A run with an optimizer at a rate, as `losses` has it."""
    recipe = model(rate, steps, sequences)
    recipe.trainer.val_check_interval = steps // validations
    if name == "Muon":
        fdl.update_callable(recipe.optim, Muon)
    start = time.perf_counter()
    found = losses(recipe)
    took = time.perf_counter() - start
    print(f"{name}, {rate:g}, {steps} steps: {last(found):.4f} after {took:.0f} s", flush=True)
    return found


def losses(recipe: Recipe) -> dict[str, Any]:
    """Trains, and returns the losses in nats a token, of each step and of validations, and the seconds of a step."""
    with tempfile.TemporaryDirectory() as directory:
        recipe.log.dir, recipe.log.name = directory, "run"
        with contextlib.redirect_stdout(io.StringIO()):
            run = pretrain(**recipe.build_arguments())
        with run.metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
    return {
        "loss": [float(row["loss"]) for row in rows if row.get("loss")],
        "val_loss": [[int(row["step"]), float(row["val_loss"])] for row in rows if row.get("val_loss")],
        "seconds_per_step": median(float(row["seconds_per_step"]) for row in rows if row.get("seconds_per_step")),
    }


def model(rate: float, steps: int, sequences: int) -> Recipe:
    """The run, with AdamW."""
    recipe = tiny()
    config = recipe.model.config
    config.num_layers, config.hidden_size, config.ffn_hidden_size = 8, 384, 1024
    config.num_attention_heads, config.num_query_groups = 6, 2
    config.share_embeddings_and_output_weights = False
    recipe.data.tokenizer = fdl.Config(BPETokenizer, vocab_size=8192)
    recipe.data.micro_batch_size = recipe.data.global_batch_size = sequences
    recipe.data.val_samples = 64
    recipe.optim.lr, recipe.optim.lr_scheduler.warmup_steps = rate, max(1, steps // 15)
    recipe.trainer.max_steps, recipe.trainer.log_every_n_steps = steps, 1
    recipe.checkpoint.every_n_steps, recipe.checkpoint.keep_best = steps, False
    return recipe


def draw(results: dict[str, Any]) -> None:
    """Draws the validation losses of all runs, with a name for the best rate of each optimizer."""
    from fiddlehead.runs.curves import PALETTE
    from fiddlehead.runs.picture import name_lines

    figure, axes = picture(7, 4)
    for (name, runs), colour in zip(results["figures"]["runs"].items(), PALETTE, strict=False):
        best = min(runs, key=lambda rate: last(runs[rate]))
        for rate, run in runs.items():
            style = {"marker": "o"} if rate == best else {"linewidth": 1, "linestyle": "dashed"}
            label = f"{name}, rate {rate}" if rate == best else "_"
            axes.plot(*zip(*run["val_loss"], strict=True), color=colour, label=label, **style)
    axes.set_title("Validation loss; dashed: other rates of the same optimizer")
    axes.set_xlabel(f"step of {results['figures']['tokens_per_step']:,} tokens")
    axes.set_ylabel("validation loss (nats per token)")
    name_lines(axes)
    save_picture(figure, PICTURE, results["where"])


if __name__ == "__main__":
    main()
