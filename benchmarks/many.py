"""Runs on several GPUs of one machine: equal to one GPU, how fast, checkpoints that move, and ranks that die.

    python benchmarks/many.py                       # all of it, on all GPUs here
    python benchmarks/many.py --parts equal kill    # some of it
    python benchmarks/many.py --parts equal speed --only ring 64k    # ring attention beside Ulysses, on 2 or more GPUs
    python benchmarks/many.py --parts equal speed --only 'tp 2' 'pp 2' 'one GPU'    # split layers, and schedules
    python benchmarks/many.py --cpus 4              # on four processes without a GPU, to try the script

Each run is a job as an executor starts it: `python -m fiddlehead.job RUN/recipe.yaml`. What it writes,
`results/many.json`, has for each part what was compared:

- `equal`: the losses of 30 float32 steps, against those of one GPU
- `speed`: tokens a second and memory, beside what the plan says
- `move`: a checkpoint that all GPUs wrote, read on half of them and on one
- `kill`: a run that is preempted, and one whose rank is killed, against one that is not
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import RESULTS, gpus_here, save, table

from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipe.edits import apply_overrides

PARTS = ("equal", "speed", "move", "kill")
STEPS = 30
DENSE = [
    "model.config.num_layers=8", "model.config.hidden_size=256", "model.config.ffn_hidden_size=704",
    "model.config.num_attention_heads=8", "model.config.num_query_groups=4",
    "model.config.share_embeddings_and_output_weights=False",
    "data.seq_length=256", "data.micro_batch_size=2", "data.global_batch_size=48", "data.val_samples=0",
    "data.tokenizer=ByteTokenizer()", "optim.lr=3e-4", "optim.lr_scheduler.warmup_steps=10",
    f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=10", "model.compile=None",
]  # fmt: skip
"""The small model that is compared: a pipeline of 8 can split its layers, and 8 ranks its heads."""
MIXTURE = [*DENSE, "model.config.num_moe_experts=8", "model.config.moe_aux_loss_coeff=0.0"]
RING = {"context_parallel_method": "ring"}
_TWICE = {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp 4": (4, {}),
    "hsdp 2x2": (4, {"data_parallel_replicate": 2}),
    "tp 4": (4, {"tensor_parallel": 4}),
    "pp 4": (4, {"pipeline_parallel": 4}),
    "pp 4, 2 stages a rank": (4, {"pipeline_parallel": 4, "pipeline_stages_per_rank": 2}),
    "cp 4": (4, {"context_parallel": 4}),
    "ring 4": (4, {"context_parallel": 4, **RING}),
    "ring 2 x tp 2": (4, {"context_parallel": 2, "tensor_parallel": 2, **RING}),
    "ep 4": (4, {"expert_parallel": 4}),
    "fsdp 2 x tp 2": (4, {"tensor_parallel": 2}),
    "fsdp 2 x cp 2": (4, {"context_parallel": 2}),
    "tp 2 x pp 2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "fsdp 2 x pp 2": (4, {"pipeline_parallel": 2}),
    "ep 2 x tp 2": (4, {"expert_parallel": 2, "tensor_parallel": 2}),
    "fsdp 3": (3, {}),
    "fsdp 2": (2, {}),
    "tp 2": (2, {"tensor_parallel": 2}),
    "pp 2": (2, {"pipeline_parallel": 2}),
    "pp 2, 2 stages a rank": (2, _TWICE),
    "pp 2, InterleavedZeroBubble": (2, {"pipeline_parallel": 2, "pipeline_schedule": "InterleavedZeroBubble"}),
    "pp 2, ZBVZeroBubble": (2, {**_TWICE, "pipeline_schedule": "ZBVZeroBubble"}),
    "pp 2, DualPipeV": (2, {**_TWICE, "pipeline_schedule": "DualPipeV"}),
    "ring 2": (2, {"context_parallel": 2, **RING}),
    "fsdp 8": (8, {}),
    "hsdp 2x4": (8, {"data_parallel_replicate": 2}),
    "fsdp 2 x tp 2 x pp 2": (8, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "fsdp 2 x cp 4": (8, {"context_parallel": 4}),
    "ep 4 x tp 2": (8, {"expert_parallel": 4, "tensor_parallel": 2}),
}
"""Name to the number of GPUs and the sizes of the strategy; those with experts train the mixture."""
SPLIT: dict[str, tuple[int, list[str]]] = {
    "one GPU": (1, []),
    "tp 2": (2, ["trainer.strategy.tensor_parallel=2"]),
    "tp 4": (4, ["trainer.strategy.tensor_parallel=4"]),
    "tp 2, NCCL": (2, ["trainer.strategy.tensor_parallel=2", "trainer.strategy.tensor_parallel_overlap=False"]),
}
"""Name to the number of GPUs and the edits of the split layers that are timed."""
_PP = ["trainer.strategy.pipeline_parallel=2"]
_PP_TWICE = [*_PP, "trainer.strategy.pipeline_stages_per_rank=2"]
SCHEDULES: dict[str, tuple[int, list[str]]] = {
    "one GPU": (1, []),
    "pp 2": (2, _PP),
    "pp 2, 2 stages a rank": (2, _PP_TWICE),
    "pp 2, 4 stages a rank": (2, [*_PP, "trainer.strategy.pipeline_stages_per_rank=4"]),
    "one GPU, eager": (1, ["model.compile=None"]),
    **{
        f"pp 2, {schedule}": (2, [*edits, f"trainer.strategy.pipeline_schedule={schedule}", "model.compile=None"])
        for schedule, edits in (("InterleavedZeroBubble", _PP), ("ZBVZeroBubble", _PP_TWICE), ("DualPipeV", _PP_TWICE))
    },
}
"""Name to the number of GPUs and the edits of the pipelines that are timed."""
AT_ONCE = 6
"""Small runs share the GPUs: so many at a time."""
TIMED = ["model.config.vocab_size=128256"]
ONE_NODE = "trainer.num_nodes=1"


def timed(devices: int) -> dict[str, tuple[str, int, list[str]]]:
    """Name to recipe, GPUs and edits of the runs that are timed."""
    cases = {}
    for count in (1, 2, 4, 8):
        cases[f"llama32_1b on {count}"] = "llama32_1b", count, [f"data.global_batch_size={8 * count}"]
    for gathers in (False, True):
        edits = ["data.global_batch_size=16", "model.fp8=tensorwise", f"model.fp8_all_gather={str(gathers).lower()}"]
        cases[f"llama32_1b on 2, fp8{' gathered' if gathers else ''}"] = "llama32_1b", 2, edits
    for name, (count, edits) in SPLIT.items():
        shared = ["data.seq_length=4096", "data.micro_batch_size=8", "data.global_batch_size=8"]
        cases[f"1b, {name}"] = "llama32_1b", count, [*shared, *edits]
    for name, (count, edits) in SCHEDULES.items():
        shared = ["data.seq_length=4096", "data.micro_batch_size=2", "data.global_batch_size=16"]
        untied = "model.config.share_embeddings_and_output_weights=False"
        cases[f"1b untied, 8 micro-batches, {name}"] = "llama32_1b", count, [*shared, untied, *edits]
    cases["llama3_8b as shipped on 8"] = "llama3_8b", 8, ["data.global_batch_size=32"]
    half = ["data.global_batch_size=16"]
    one = ["data.micro_batch_size=1"]
    cases["llama3_8b on 4"] = "llama3_8b", 4, [*half, *one]
    found = ["data.micro_batch_size=4", "model.activation_checkpointing=0.5"]
    cases["llama3_8b on 4, as the search finds"] = "llama3_8b", 4, [*half, *found]
    cases["llama3_8b on 4, nothing recomputed"] = "llama3_8b", 4, [*half, *one, "model.activation_checkpointing=None"]
    cases["llama3_8b on 4, fp8"] = "llama3_8b", 4, [*half, *one, "model.fp8=tensorwise"]
    gathered = ["model.fp8=tensorwise", "model.fp8_all_gather=true"]
    cases["llama3_8b on 4, fp8 gathered"] = "llama3_8b", 4, [*half, *one, *gathered]
    for count, recompute in ((4, "full"), (8, "selective")):
        cases[f"llama31_8b_128k, cp {count}"] = (
            "llama31_8b_128k",
            count,
            [
                f"trainer.strategy.context_parallel={count}",
                "data.global_batch_size=1",
                f"model.activation_checkpointing={recompute}",
            ],
        )
    tiled = ["trainer.strategy.context_parallel=4", "data.global_batch_size=1", "model.tiled_mlp=8192"]
    selective = [*tiled, "model.activation_checkpointing=selective"]
    cases["llama31_8b_128k, cp 4, selective, tiled"] = "llama31_8b_128k", 4, selective
    for count, method in ((count, method) for count in (2, 4, 8) for method in ("ulysses", "ring")):
        shared = [f"trainer.strategy.context_parallel={count}", f"trainer.strategy.context_parallel_method={method}"]
        one = ["data.seq_length=65536", "data.micro_batch_size=1", "data.global_batch_size=1"]
        edits = [*shared, *one, "model.activation_checkpointing=full"]
        cases[f"1b 64k, {method} {count}"] = "llama32_1b", count, edits
    for count in (4, 8):
        cases[f"mixtral_8x7b of 6 layers, ep {count}"] = (
            "mixtral_8x7b",
            count,
            [
                "model.config.num_layers=6",
                "data.micro_batch_size=1",
                f"trainer.strategy.expert_parallel={count}",
                "model.compile=None",
                "model.activation_checkpointing=selective",
                "data.seq_length=4096",
                f"data.global_batch_size={4 * count}",
            ],
        )
    return {name: case for name, case in cases.items() if case[1] <= devices}


def main() -> None:
    """Runs the parts, prints their tables and writes `results/many.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names have one of these words")
    parser.add_argument("--exact", nargs="*", default=[], help="these cases")
    parser.add_argument("--cpus", type=int, default=0, help="use so many processes without a GPU")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    parser.add_argument("--timeout", type=float, default=None, help="seconds after which a run is ended")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    devices = given.cpus or gpus_here()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), devices, given)
        signal.signal(signal.SIGTERM, lambda *_: bench.end_jobs())
        for part in given.parts:
            results[part] = getattr(bench, part)()
            given.out.mkdir(exist_ok=True)
            (given.out / "many_partial.json").write_text(json.dumps(results, indent=1))
    save("many", results, ["torch", "lightning", "triton", "flash-attn"], {"devices": devices}, given.out)


class Bench:
    """The parts; each method of a part's name returns its figures, and prints them."""

    def __init__(self, folder: Path, devices: int, given: argparse.Namespace) -> None:
        self.folder, self.devices, self.given = folder, devices, given
        self.allowed: dict[Path, Sequence[str]] = {}
        self.jobs: set[int] = set()

    def end_jobs(self) -> None:
        """Ends what runs, and this process: jobs are sessions of their own, and would keep the GPUs busy."""
        for job in self.jobs:
            os.killpg(job, signal.SIGKILL)
        os._exit(1)

    # -- parts

    def equal(self) -> dict[str, Any]:
        """The greatest relative difference of a loss, and of a gradient norm, from those of one GPU."""
        layouts = {name: layout for name, layout in LAYOUTS.items() if layout[0] <= self.devices and self._wanted(name)}
        runs = {"dense on 1": self._small("dense", 1, {})}
        if any("expert_parallel" in sizes for _, sizes in layouts.values()):
            runs["mixture on 1"] = self._small("mixture", 1, {}, MIXTURE)
        runs |= {name: self._small(name, *layout, _model(layout[1])) for name, layout in layouts.items()}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            codes = dict(zip(runs, pool.map(self._job, runs.values()), strict=True))
        results = {}
        for name, (_, sizes) in layouts.items():
            one = runs["mixture on 1" if "expert_parallel" in sizes else "dense on 1"]
            results[name] = {"failed": _end(runs[name])} if codes[name] else _difference(one, runs[name])
        _print_differences(results)
        return results

    def speed(self) -> dict[str, Any]:
        """Figures of the timed steps, and what the plan says of the same recipe."""
        from fiddlehead.bench import RESULTS as FIGURES
        from fiddlehead.bench import as_benchmark

        results = {}
        for name, (recipe_name, count, edits) in timed(self.devices).items():
            if not self._wanted(name):
                continue
            recipe = apply_overrides(catalog.find_recipe(recipe_name)(), [*TIMED, *edits], find=catalog.find_part)
            recipe.trainer.devices, recipe.trainer.num_nodes = count, 1
            if self.given.cpus:
                _shrink(recipe)
            recipe = as_benchmark(recipe, steps=self.given.steps, warmup=self.given.warmup, random_tokens=True)
            run = self._write(name, recipe)
            began = time.monotonic()
            failed = self._job(run)
            if failed:
                results[name] = {"failed": _end(run)}
            else:
                results[name] = json.loads((run / FIGURES).read_text())
                results[name] |= {"recipe": recipe_name, "edits": [f"trainer.devices={count}", ONE_NODE, *edits]}
                results[name]["plan"] = {} if self.given.cpus else _planned(recipe)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
            self.given.out.mkdir(exist_ok=True)
            (self.given.out / "many_speed_partial.json").write_text(json.dumps(results, indent=1))
        _print_speeds(results)
        return results

    def move(self) -> dict[str, Any]:
        """A run's checkpoint at step 10, by all GPUs, read by fewer; compared with a run that all GPUs finish."""
        counts = sorted({1, max(1, self.devices // 2), self.devices}, reverse=True)
        sizes = {"tensor_parallel": 2} if self.devices >= 4 else {}
        whole = self._small("moved", self.devices, sizes, more=["checkpoint.keep_last=5"])
        codes = [self._job(whole)]
        results: dict[str, Any] = {}
        checkpoint = f"resume={whole / 'checkpoints' / 'step-00000010'}"
        runs = {count: self._small(f"moved to {count}", count, {}, more=[checkpoint]) for count in counts}
        with ThreadPoolExecutor(len(runs)) as pool:
            codes += pool.map(self._job, runs.values())
        for count, run in runs.items():
            name = f"written on {self.devices}{' (tp 2)' if sizes else ''}, read on {count}"
            results[name] = {"failed": _end(run)} if any(codes) else _difference(whole, run)
        _print_differences(results)
        return results

    def kill(self) -> dict[str, Any]:
        """Ends a run in two ways, lets it go on, and compares it with one that was left alone."""
        whole = self._small("undisturbed", self.devices, {})
        ways = {"preempted (SIGTERM to the job)": _preempt, "a rank killed (SIGKILL)": _kill_a_rank}
        runs = {way: self._small(f"ended {i}", self.devices, {}) for i, way in enumerate(ways)}
        with ThreadPoolExecutor(3) as pool:
            code = pool.submit(self._job, whole)
            ends = {way: pool.submit(self._ended_by, run, ways[way]) for way, run in runs.items()}
        results: dict[str, Any] = {}
        for way, run in runs.items():
            stopped = ends[way].result()
            again = self._job(run)
            results[way] = {"failed": _end(run)} if code.result() or again else _difference(whole, run)
            results[way] |= {"exit_code": stopped, "attempts": len(list((run / "checkpoints").iterdir()))}
        _print_differences(results)
        return results

    # -- runs

    def _wanted(self, name: str) -> bool:
        if self.given.exact:
            return name in self.given.exact
        return not self.given.only or any(word in name for word in self.given.only)

    def _small(
        self, name: str, count: int, sizes: dict[str, Any], edits: Sequence[str] = DENSE, more: Sequence[str] = ()
    ) -> Path:
        """Writes the recipe of a run of the small model on `count` GPUs."""
        recipe = apply_overrides(catalog.find_recipe("tiny")(), edits, find=catalog.find_part)
        recipe = apply_overrides(recipe, more, find=catalog.find_part)
        if self.given.cpus:
            recipe.model.config.hidden_size = recipe.model.config.ffn_hidden_size = recipe.data.seq_length = 64
        recipe.trainer.accelerator, recipe.trainer.devices = "cpu" if self.given.cpus else "gpu", count
        if count > 1:
            strategy = [f"trainer.strategy.{size}={value}" for size, value in sizes.items()]
            recipe = apply_overrides(recipe, ["trainer.strategy=Parallel()", *strategy], find=catalog.find_part)
        return self._write(name, recipe)

    def _write(self, name: str, recipe: Recipe) -> Path:
        run = self.folder / name.replace(" ", "-").replace(",", "")
        run.mkdir()
        recipe.save(run / "recipe.yaml")
        self.allowed[run] = recipe.names_to_allow()
        return run

    def _job(self, run: Path) -> int:
        """Runs a job to its end, or until it has taken too long, and returns its exit code."""
        with self._started(run) as job:
            try:
                return job.wait(self.given.timeout)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                with (run / "said.txt").open("a") as said:
                    said.write(f"ended after {self.given.timeout:g} s\n")
                return 1

    @contextmanager
    def _started(self, run: Path) -> Iterator[subprocess.Popen]:
        command = [sys.executable, "-W", "ignore", "-m", "fiddlehead.job", str(run / "recipe.yaml")]
        command += [word for name in self.allowed[run] for word in ("--allow", name)]
        variables = {"FIDDLEHEAD_REQUEUES": "3"}  # as in a queue that starts a job again
        variables |= {"OMP_NUM_THREADS": "1"} if self.given.cpus else {}
        with (run / "said.txt").open("a") as said:
            streams: dict[str, Any] = {"stdout": said, "stderr": subprocess.STDOUT}
            job = subprocess.Popen(command, **streams, env=os.environ | variables, start_new_session=True)
            self.jobs.add(job.pid)
            try:
                yield job
            finally:
                job.kill() if job.poll() is None else None
                job.wait()
                self.jobs.discard(job.pid)

    def _ended_by(self, run: Path, end: Any) -> int:
        """Runs a job, ends it by `end` when it has done some steps, and returns its exit code."""
        with self._started(run) as job:
            while job.poll() is None and _steps(run) < STEPS // 2:
                time.sleep(0.02)
            if job.poll() is None:
                end(job)
            return job.wait()


def _model(sizes: dict[str, Any]) -> list[str]:
    return MIXTURE if "expert_parallel" in sizes else DENSE


def _preempt(job: subprocess.Popen) -> None:
    """As Slurm does, some time before it takes the machine."""
    job.send_signal(signal.SIGTERM)


def _kill_a_rank(job: subprocess.Popen) -> None:
    """As the kernel does when memory runs out."""
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)


def _steps(run: Path) -> int:
    rows = _rows(run)
    return int(rows[-1]["step"]) if rows else 0


def _rows(run: Path) -> list[dict[str, str]]:
    """The lines of a run's metrics that have a loss."""
    file = run / "metrics.csv"
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row.get("loss")]


def _difference(one: Path, other: Path) -> dict[str, Any]:
    """The greatest relative differences at the steps that both runs have; the later line of a repeated step counts."""
    ours, theirs = ({row["step"]: row for row in _rows(run)} for run in (one, other))
    common = [step for step in ours if step in theirs]
    result: dict[str, Any] = {"steps": len(common), "last_loss": float(ours[common[-1]]["loss"])}
    for name in ("loss", "grad_norm"):
        pairs = [(float(ours[step][name]), float(theirs[step][name])) for step in common]
        differences = [abs(a - b) / abs(a) for a, b in pairs]
        result[name] = max(differences)
        result[f"{name}_at_step"] = int(common[differences.index(result[name])])
    return result


def _end(run: Path) -> str:
    """The last of what a run said."""
    return "\n".join((run / "said.txt").read_text().splitlines()[-25:])[-2500:]


def _planned(recipe: Recipe) -> dict[str, Any]:
    from fiddlehead import launch

    planned = launch.plan(recipe, target="h100")
    if planned.problems:
        return {"problems": [str(problem) for problem in planned.problems]}
    training = planned.training
    return {
        "memory": None if training.memory is None else training.memory.to_dict(),
        "speed": None if training.speed is None else training.speed.to_dict(),
    }


def _shrink(recipe: Recipe) -> None:
    """Makes a model of nothing, for a CPU."""
    config = recipe.model.config
    for field, value in {"num_layers": 8, "hidden_size": 128, "ffn_hidden_size": 128, "vocab_size": 300}.items():
        setattr(config, field, value)
    config.num_attention_heads, config.num_query_groups = 8, 4
    recipe.trainer.accelerator, recipe.model.compile = "cpu", None
    recipe.model.fp8, recipe.model.fp8_all_gather = None, False
    recipe.data.seq_length = 64


def _print_differences(results: dict[str, Any]) -> None:
    rows = []
    for name, result in results.items():
        if "failed" in result:
            rows.append([name, "failed", "", ""])
            print(f"{name} failed:\n{result['failed']}", file=sys.stderr)
        else:
            rows.append([name, f"{result['steps']}", f"{result['loss']:.1e}", f"{result['grad_norm']:.1e}"])
    print(table(["run", "steps", "loss", "gradient norm"], rows), flush=True)


def _print_speeds(results: dict[str, Any]) -> None:
    rows = []
    for name, result in results.items():
        if "failed" in result:
            rows.append([name, "failed", "", "", "", ""])
            print(f"{name} failed:\n{result['failed']}", file=sys.stderr)
            continue
        figures, plan = result["figures"], result["plan"]
        speed, memory = plan.get("speed") or {}, plan.get("memory") or {}
        planned_rate = speed.get("tokens_per_s", 0) / result["what"]["devices"]
        row = [f"{figures['tokens_per_s_per_device']:,.0f}", f"{planned_rate:,.0f}"]
        row += [f"{100 * figures.get('mfu', 0):.1f}", f"{figures['memory_gib']:.1f}"]
        rows.append([name, *row, f"{memory.get('peak', 0) / 2**30:.1f}"])
    print(table(["run", "tokens/s a GPU", "planned", "MFU %", "GiB", "planned"], rows), flush=True)


if __name__ == "__main__":
    main()
