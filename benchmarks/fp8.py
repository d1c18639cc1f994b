"""The effect of float8 products on the loss: a Llama 3.2 1B in bfloat16 and with `fp8`, on the same real text.

    python benchmarks/fp8.py             # on a GPU; --tiny --steps 3: on a CPU, to try the script

Both runs have the same weights and batches of Python's standard library, and share the GPU, which does not change the
losses. `train.py` measures their speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

import fiddle as fdl
from measure import save, table
from muon import losses

from fiddlehead.bench import NoCheckpoint
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.llama import llama32_1b
from fiddlehead.recipes.tiny import tiny

ARMS = ("bf16", "tensorwise", "rowwise")


def main() -> None:
    """Prints the table and writes `results/fp8.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS[:2], choices=ARMS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, in float32")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(losses(recipe(given.child, given.steps, given.tiny))))
        return
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--steps",
        str(given.steps),
        *(["--tiny"] if given.tiny else []),
    ]
    children = {
        arm: subprocess.Popen([*command, "--child", arm], stdout=subprocess.PIPE, text=True) for arm in given.arms
    }
    printed = {arm: child.communicate()[0] for arm, child in children.items()}
    if failed := [arm for arm, child in children.items() if child.returncode]:
        sys.exit(f"failed: {', '.join(failed)}")
    runs = {arm: json.loads(text.splitlines()[-1]) for arm, text in printed.items()}
    ends = {arm: (statistics.fmean(run["loss"][-20:]), run["val_loss"][-1][1]) for arm, run in runs.items()}
    base = ends[given.arms[0]]
    rows = [
        [arm, f"{loss:.4f}", f"{loss / base[0] - 1:+.2%}", f"{val:.4f}", f"{val / base[1] - 1:+.2%}"]
        for arm, (loss, val) in ends.items()
    ]
    print(table(["", "loss, last 20 steps", "", "validation loss", ""], rows))
    if not given.tiny:
        save("fp8", {"steps": given.steps, "runs": runs}, ["torch", "torchao"])


def recipe(arm: str, steps: int, small: bool) -> Recipe:
    """The run of an arm, on one device."""
    run = tiny() if small else llama32_1b()
    if not small:
        run.model.config.vocab_size = None  # the tokenizer's
        run.data = tiny().data
        run.data.tokenizer.vocab_size = 16_384
        run.data.seq_length, run.data.micro_batch_size, run.data.global_batch_size = 2048, 2, 2
        run.trainer.devices, run.trainer.strategy = 1, "auto"
        if arm != "bf16":
            run.model.fp8 = arm
    run.data.val_samples = 32
    run.optim.lr_scheduler.warmup_steps = max(1, steps // 10)
    run.trainer.max_steps, run.trainer.val_check_interval, run.trainer.log_every_n_steps = steps, steps, 1
    run.checkpoint = fdl.Config(NoCheckpoint)
    return run


if __name__ == "__main__":
    main()
