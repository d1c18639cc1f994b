"""The effect of float8 products on the loss: Llama 3.2 1B's layers in bfloat16 and with float8, on the same real text.

    python benchmarks/fp8.py                  # on a GPU: all arms, with 4 of the 16 layers
    python benchmarks/fp8.py --layers 16 --at-once 2 --arms bf16 tensorwise
    python benchmarks/fp8.py --arms bf16 tensorwise --seeds 1 2 3 4 5 6 7 8
    python benchmarks/fp8.py --tiny --steps 3 # on a CPU, to try the script

The runs of a seed have the same weights and batches of Python's standard library. They share the GPU, which does not
change the losses; `train.py` measures their speed. One arm is bfloat16 with another attention kernel, which rounds
differently: its distance from the first is what rounding alone does to a run. Two runs of one arm may differ as much,
so with several seeds the difference of two arms is a mean, with its standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fiddle as fdl
from measure import save, table
from muon import losses

from fiddlehead.bench import NoCheckpoint
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.llama import llama32_1b
from fiddlehead.recipes.tiny import tiny

ARMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, other attention": {"attention_backend": "sdpa_flash"},
    "tensorwise": {"fp8": "tensorwise"},
    "rowwise": {"fp8": "rowwise"},
    "rowwise_with_gw_hp": {"fp8": "rowwise_with_gw_hp"},
}
LAST = 50
"""Steps at the end whose losses are compared."""


def main() -> None:
    """Prints the table and writes `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234])
    parser.add_argument("--at-once", type=int, default=len(ARMS), help="runs that share the GPU")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, in float32")
    parser.add_argument("--name", default="fp8", help="of the file of results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run = recipe(given.child, given.steps, given.layers, given.tiny)
        (run.seed,) = given.seeds
        print(json.dumps(losses(run)))
        return
    settings = ["--steps", str(given.steps), "--layers", str(given.layers), *(["--tiny"] if given.tiny else [])]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}

    def train(arm_and_seed: tuple[str, int]) -> dict[str, Any]:
        arm, seed = arm_and_seed
        command = [sys.executable, "-W", "ignore", __file__, *settings, "--child", arm, "--seeds", str(seed)]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if printed.returncode:
            return {}
        print(f"{arm}, seed {seed}, has ended", flush=True)
        return json.loads(printed.stdout.splitlines()[-1])

    wanted = list(itertools.product(given.arms, given.seeds))
    with ThreadPoolExecutor(given.at_once) as pool:
        trained = dict(zip(wanted, pool.map(train, wanted), strict=True))
    runs = {arm: {str(seed): trained[arm, seed] for seed in given.seeds} for arm in given.arms}
    if not given.tiny:
        save(given.name, {"steps": given.steps, "layers": given.layers, "runs": runs}, ["torch", "torchao"])
    failed = [f"{arm}, seed {seed}" for (arm, seed), run in trained.items() if not run]
    ends = {arm: [each for run in of_seeds.values() if (each := end(run))] for arm, of_seeds in runs.items()}
    base = ends[given.arms[0]]
    if failed and len(base) < len(given.seeds):  # nothing to compare with
        sys.exit(f"failed: {'; '.join(failed)}")
    rows = []
    for arm, found in ends.items():
        if len(found) == len(base):
            columns = [compared([run[i] for run in found], [run[i] for run in base]) for i in range(2)]
            rows.append([arm, *itertools.chain(*columns)])
    print(table(["", f"loss, last {LAST} steps", "", "validation loss", ""], rows))
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def end(run: dict[str, Any]) -> tuple[float, float] | None:
    """The loss at the end of a run, in training and in validation; None if it failed."""
    return (statistics.fmean(run["loss"][-LAST:]), run["val_loss"][-1][1]) if run else None


def compared(found: list[float], base: list[float]) -> list[str]:
    """The mean over the seeds, and how much more it is than that of the first arm, with the standard error."""
    more = [each / other - 1 for each, other in zip(found, base, strict=True)]
    error = "" if len(more) == 1 else f" ± {statistics.stdev(more) / math.sqrt(len(more)):.2%}"
    return [f"{statistics.fmean(found):.4f}", f"{statistics.fmean(more):+.2%}{error}"]


def recipe(arm: str, steps: int, layers: int, small: bool) -> Recipe:
    """The run of an arm, on one device."""
    run = tiny() if small else llama32_1b()
    changes = dict(ARMS[arm])
    if not small:
        run.model.config.vocab_size = None  # the tokenizer's
        run.model.config.num_layers = layers
        run.model.config.attention_backend = changes.pop("attention_backend", "auto")
        run.data = tiny().data
        run.data.tokenizer.vocab_size = 16_384
        run.data.seq_length, run.data.micro_batch_size, run.data.global_batch_size = 2048, 2, 2
        run.trainer.devices, run.trainer.strategy = 1, "auto"
        for name, value in changes.items():
            setattr(run.model, name, value)
    run.data.val_samples = 32
    run.optim.lr_scheduler.warmup_steps = max(1, steps // 10)
    run.trainer.max_steps, run.trainer.val_check_interval, run.trainer.log_every_n_steps = steps, steps, 1
    run.checkpoint = fdl.Config(NoCheckpoint)
    return run


if __name__ == "__main__":
    main()
