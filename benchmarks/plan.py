"""What a step really takes, memory and time, for a grid of shapes, batches, precisions and layouts.

    python benchmarks/plan.py                          # all cases that the GPUs here allow
    python benchmarks/plan.py --only 8b fsdp           # those whose names have one of these words
    python benchmarks/plan.py --tiny --only 1b         # models of nothing on a CPU, to try the script

A case is a recipe with edits, in a process of its own: its first step and its memory are its own. The file that this
writes, `results/plan.json`, is what the plan is compared with.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from measure import RESULTS, gpus_here, save, table

GIB = 2**30
LAYERS_8B = "model.config.num_layers=6"
OFFLOADED, STATE = "model.activation_offloading=True", "optim.state_offloading=True"
ONE = ["trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto"]
CASES: dict[str, tuple[str, list[str]]] = {}
"""Name to recipe and edits; those with `trainer.devices=2` need two GPUs."""


def case(name: str, recipe: str, *edits: str, batch: int = 4, seq: int = 4096, accumulate: int = 1, **two: int) -> None:
    """Adds one to `CASES`: `two` are sizes of the strategy on two GPUs."""
    ranks = two.get("data_parallel", 1)
    strategy = [f"trainer.strategy.{size}={value}" for size, value in two.items()]
    where = ["trainer.devices=2", "trainer.num_nodes=1", *strategy] if two else ONE
    sizes = [
        f"data.seq_length={seq}",
        f"data.micro_batch_size={batch}",
        f"data.global_batch_size={batch * accumulate * ranks}",
    ]
    recomputes = any(edit.startswith("model.activation_checkpointing=") for edit in edits)
    if recipe != "dpo" and not recomputes:  # a model for preferences cannot compute again
        sizes.append("model.activation_checkpointing=None")
    CASES[name] = recipe, [*where, *sizes, *edits]


def fill() -> None:
    """The grid."""
    true, full = "trainer.precision=bf16-true", "model.activation_checkpointing=full"
    selective, half = "model.activation_checkpointing=selective", "model.activation_checkpointing=0.5"
    most, eager = "model.activation_checkpointing=0.9", "model.compile=None"
    for batch in (1, 2, 4, 8):
        case(f"1b b{batch}", "llama32_1b", batch=batch)
    for name, edits in {
        "bf16-true": [true],
        "full": [full],
        "selective": [selective],
        "0.9": [most],
        "0.5": [half],
        "eager": [eager],
        "eager full": [eager, full],
        "eager selective": [eager, selective],
        "eager bf16-true": [eager, true],
        "compiled model": ["model.compile=model"],
        "fp8": ["model.fp8=tensorwise"],
        "Muon": ["optim=Muon"],
        "8-bit": ["optim.state_bits=8"],
        "float32": ["trainer.precision=32-true"],
    }.items():
        case(f"1b b4 {name}", "llama32_1b", *edits, batch=2 if name == "float32" else 4)
    case("1b b8 bf16-true", "llama32_1b", true, batch=8)
    case("1b b3 3000", "llama32_1b", batch=3, seq=3000)
    case("1b b8 2k", "llama32_1b", batch=8, seq=2048)
    case("1b b2 8k", "llama32_1b", batch=2, seq=8192)
    case("1b b1 16k full", "llama32_1b", full, batch=1, seq=16384)
    case("1b b1 64k full", "llama32_1b", full, batch=1, seq=65536)
    tiled = "model.tiled_mlp=8192"
    case("1b b1 64k full tiled", "llama32_1b", full, tiled, batch=1, seq=65536)
    case("1b b4 tiled", "llama32_1b", "model.tiled_mlp=4096")
    case("1b b1 128k selective tiled", "llama32_1b", true, selective, tiled, batch=1, seq=2**17)
    case("1b b4 8k x2", "llama32_1b", batch=4, seq=8192, accumulate=2)
    case("1b b8 8k selective x2", "llama32_1b", selective, batch=8, seq=8192, accumulate=2)
    case("1b b6 8k", "llama32_1b", batch=6, seq=8192)  # the plan says that it does not fit in 80 GB
    case("1b b2 x4", "llama32_1b", batch=2, accumulate=4)
    case("1b b4 8k 0.5", "llama32_1b", half, seq=8192)
    four, bits = "model.config.num_layers=4", "optim.state_bits=8"  # all its layers take a quarter of an hour a step
    case("1b4 b1 1m full tiled offloaded", "llama32_1b", four, full, tiled, OFFLOADED, bits, batch=1, seq=2**20)
    case("1b b2 64k full tiled offloaded", "llama32_1b", full, tiled, OFFLOADED, batch=2, seq=65536)
    case("1b b4 bf16-true state offloaded", "llama32_1b", true, STATE)
    case("1b b4 state offloaded", "llama32_1b", STATE)
    offloaded = [true, full, STATE]
    case("8b8 b1 8k full state offloaded", "llama3_8b", "model.config.num_layers=8", *offloaded, batch=1, seq=8192)
    case("8b b1 8k full state offloaded", "llama3_8b", *offloaded, batch=1, seq=8192)
    case("8b b2 8k full x8 state offloaded", "llama3_8b", *offloaded, batch=2, seq=8192, accumulate=8)
    long = [true, full, tiled, OFFLOADED, STATE]
    for seq, layers, groups in ((2**18, 4, None), (2**18, 4, 2), (2**18, 4, 1), (2**19, 2, None), (2**19, 2, 2)):
        heads = [] if groups is None else [f"model.tiled_attention={groups}"]
        name = f"8b{layers} b1 {seq // 1024}k full tiled offloaded{f' heads {groups}' if groups else ''}"
        case(name, "llama3_8b", f"model.config.num_layers={layers}", *long, *heads, batch=1, seq=seq)
    # A window makes attention short, and every tensor keeps its size: all layers of the longest sequences, in a minute.
    windowed = [*long, "model.config.window_size=(4096,0)"]
    in_heads = "model.tiled_attention=2"
    case("8b b1 512k full tiled offloaded heads 2 window", "llama3_8b", *windowed, in_heads, batch=1, seq=2**19)
    case("1b b1 1m full tiled offloaded heads 2 window", "llama32_1b", *windowed, in_heads, batch=1, seq=2**20)
    for batch in (1, 2, 4):
        case(f"8b6 b{batch}", "llama3_8b", LAYERS_8B, batch=batch)
    for name, edits in {
        "bf16-true": [true],
        "full": [full],
        "selective": [selective],
        "0.5": [half],
        "eager": [eager],
        "fp8 full": ["model.fp8=tensorwise", full],
    }.items():
        case(f"8b6 b4 {name}", "llama3_8b", LAYERS_8B, *edits)
    case("8b6 b1 16k full", "llama3_8b", LAYERS_8B, full, batch=1, seq=16384)
    case("8b6 b4 8k 0.5", "llama3_8b", LAYERS_8B, half, seq=8192)
    case("8b6 b4 8k 0.5 bf16-true", "llama3_8b", LAYERS_8B, half, true, seq=8192)
    case("8b6 b3 0.7", "llama3_8b", LAYERS_8B, "model.activation_checkpointing=0.7", batch=3)
    lora = ["model.init_from=WEIGHTS", "model.config=None", "model.lora=LoRA(rank=16)"]
    case("8b6 lora b4", "llama3_8b", *lora)
    case("8b6 lora b4 full", "llama3_8b", *lora, full)
    quantized = ["model.lora.quantize_base=nf4", "trainer.precision=bf16-true"]
    case("8b6 lora nf4 b2", "llama3_8b", *lora, *quantized, batch=2)
    pairs = ["model.init_from=WEIGHTS", "data.paths=PAIRS", "data.tokenizer=TOKENIZER"]
    case("8b6 lora dpo b2", "dpo", *pairs, batch=2)
    case("gpt2 b16 1k", "gpt2_124m", batch=16, seq=1024)
    case("gemma2 b2", "gemma2_2b", "model.config.num_layers=6", batch=2)
    case("qwen3 b8 2k", "qwen3_600m", batch=8, seq=2048)
    case("olmo2 b4", "olmo2_1b", batch=4)
    moe = ["model.config.num_layers=4", "model.config.hidden_size=2048", "model.config.ffn_hidden_size=4096"]
    none = "model.activation_checkpointing=None"
    case("moe b4", "mixtral_8x7b", *moe, none)
    case("moe b4 full", "mixtral_8x7b", *moe, eager, full)
    # -- two GPUs
    case("fsdp 1b b4", "llama32_1b", data_parallel=2)
    case("fsdp 1b b4 x2", "llama32_1b", accumulate=2, data_parallel=2)
    case("fsdp 8b b1 8k full", "llama3_8b", true, full, batch=1, seq=8192, data_parallel=2)
    case("fsdp 8b b1 4k full mixed", "llama3_8b", full, batch=1, data_parallel=2)
    # The layout that the plan's search finds for two GPUs comes first, then what one would try by hand.
    case("fitted 8b b2 8k full x2", "llama3_8b", true, full, batch=2, seq=8192, accumulate=2, data_parallel=2)
    case("by hand 8b b1 8k full x4", "llama3_8b", true, full, batch=1, seq=8192, accumulate=4, data_parallel=2)
    by_sequence = {"batch": 1, "seq": 8192, "accumulate": 8, "context_parallel": 2}
    case("by hand 8b b1 8k selective cp x8", "llama3_8b", true, selective, **by_sequence)
    by_state: dict[str, Any] = {"seq": 8192, "accumulate": 8, "data_parallel": 2}
    case("fsdp 8b b2 8k selective x8 state offloaded", "llama3_8b", true, STATE, selective, batch=2, **by_state)
    case("fsdp 8b b1 8k x8 state offloaded", "llama3_8b", true, STATE, batch=1, **by_state)
    case("fsdp 8b6 b2", "llama3_8b", LAYERS_8B, batch=2, data_parallel=2)
    case("tp 1b b4", "llama32_1b", tensor_parallel=2)
    case("tp 8b6 b4 full", "llama3_8b", LAYERS_8B, full, tensor_parallel=2)
    case("cp 1b 32k full", "llama32_1b", full, batch=1, seq=32768, context_parallel=2)
    case("cp 1b 512k full tiled", "llama32_1b", full, tiled, batch=1, seq=524288, context_parallel=2)
    case("cp 1b 128k full tiled", "llama32_1b", full, tiled, batch=1, seq=131072, context_parallel=2)
    case("cp 1b 2m full tiled offloaded window", "llama32_1b", *windowed, batch=1, seq=2**21, context_parallel=2)
    case("cp 1b b4", "llama32_1b", context_parallel=2)
    untied = "model.config.share_embeddings_and_output_weights=False"
    case("pp 1b b2 x8", "llama32_1b", untied, batch=2, accumulate=8, pipeline_parallel=2)
    twice = "trainer.strategy.pipeline_stages_per_rank=2"
    case("pp 1b b2 x8 twice", "llama32_1b", untied, twice, batch=2, accumulate=8, pipeline_parallel=2)
    case("pp 8b6 b1 x8 full", "llama3_8b", LAYERS_8B, full, batch=1, accumulate=8, pipeline_parallel=2)
    case("ep moe b2", "mixtral_8x7b", *moe, eager, none, "trainer.strategy.expert_parallel=2", batch=2, data_parallel=2)
    case("ddp 1b b4", "llama32_1b", data_parallel=2)
    CASES["ddp 1b b4"][1][2:3] = ["trainer.strategy=ddp"]


class Points(Callback):
    """Notes, in the last step, what is allocated between its phases, and the most within each; in bytes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.points: dict[str, Any] = {}
        self.before = 0

    def _point(self, name: str) -> None:
        if not torch.cuda.is_available():
            return
        self.points[name] = {"peak": torch.cuda.max_memory_allocated(), "after": torch.cuda.memory_allocated()}
        torch.cuda.reset_peak_memory_stats()

    def _last(self, trainer: Any) -> bool:
        return trainer.global_step == trainer.max_steps - 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The parameters are made."""
        self._point("made")
        self.points["mlp"] = pl_module.mlp.backend

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The batch is on the device."""
        if self._last(trainer):
            self._point("before" if "before" not in self.points else "between")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The forward pass is done."""
        if self._last(trainer):
            self._point("forward")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """So is the backward pass."""
        if self._last(trainer):
            self._point("backward")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The optimizer's step is done, if it was the last micro-batch."""
        if trainer.global_step != trainer.max_steps:
            return
        self._point("optimizer")
        on_gpu = torch.cuda.is_available()
        self.points["reserved"] = torch.cuda.max_memory_reserved() if on_gpu else 0
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            self.points["outside"] = total - free - torch.cuda.memory_reserved()  # the context, NCCL, other processes
            self.points["total"] = total
        if trainer.is_global_zero:
            Path(self.file).write_text(json.dumps(self.points))


def main() -> None:
    """Runs the cases, prints the table and writes `results/plan.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names have one of these words")
    parser.add_argument("--exact", nargs="*", default=[], help="these cases")
    parser.add_argument("--devices", type=int, default=gpus_here(), help="run the cases for so many")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    fill()
    if given.child:
        measure(given.child, given)
        return
    import fiddlehead.bench
    import fiddlehead.recipe.catalog  # noqa: F401

    results: dict[str, Any] = {}
    started = os.times().elapsed
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, edits) in CASES.items():
            two = "trainer.devices=2" in edits
            chosen = name in given.exact if given.exact else not given.only or any(w in name for w in given.only)
            if not chosen or (two != (given.devices == 2) and not given.tiny):
                continue
            if os.times().elapsed - started > given.seconds:
                break
            results[name] = run_case(name, two, given, Path(folder))
            given.out.mkdir(exist_ok=True)
            (given.out / "plan_partial.json").write_text(json.dumps(results, indent=1))
    rows = [
        [name, f"{r['peak'] / GIB:.2f}", f"{1000 * r['figures']['seconds_per_step']['min']:,.0f}"]
        for name, r in results.items()
        if "failed" not in r
    ]
    print(table(["case", "peak GiB", "ms a step"], rows))
    gpu = next((r["what"]["device"] for r in results.values() if "what" in r), "none")
    save("plan", results, ["torch", "lightning", "torchao"], {"gpu": gpu}, given.out)


def run_case(name: str, two: bool, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a process measures of one case, or why it `failed`."""
    weights = folder / "weights"
    if "lora" in name and not weights.exists():  # in another process: the parent of forks must not start CUDA
        process = multiprocessing.get_context("fork").Process(target=write_weights, args=(weights, given.tiny))
        process.start()
        process.join()
    began = os.times().elapsed
    said = folder / "said.txt"
    if two:
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [
            __file__,
            "--child",
            name,
            "--steps",
            str(given.steps),
            "--warmup",
            str(given.warmup),
            "--weights",
            str(weights),
        ]
        command += ["--out", str(folder), *(["--tiny"] if given.tiny else [])]
        with said.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    else:  # a fork has the imports behind it
        given.weights = weights
        process = multiprocessing.get_context("fork").Process(target=forked, args=(name, given, folder, said))
        process.start()
        process.join()
        code = process.exitcode
    file = folder / "case.json"
    if code == 0 and file.exists():
        results = json.loads(file.read_text())
        file.unlink()
    else:
        results = {"failed": "\n".join((said.read_text().strip() or "nothing").splitlines()[-40:])[-2500:]}
    results["seconds"] = os.times().elapsed - began
    line = results.get("failed") or f"{results['peak'] / GIB:.2f} GiB"
    print(f"{name}: {line} ({results['seconds']:.0f} s)", file=sys.stderr, flush=True)
    return results


def forked(name: str, given: argparse.Namespace, folder: Path, said: Path) -> None:
    """As `measure`, in a process of its own, whose output goes to the file `said`."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        given.out = folder
        measure(name, given)


def measure(name: str, given: argparse.Namespace) -> None:
    """Trains a case in this process, and writes its figures to `case.json`."""
    import fiddle as fdl

    from fiddlehead.bench import RESULTS as FIGURES
    from fiddlehead.bench import as_benchmark
    from fiddlehead.recipe import catalog
    from fiddlehead.recipe.edits import apply_overrides

    recipe_name, edits = CASES[name]
    pairs = given.weights.parent / "pairs.jsonl"
    if on_pairs := "data.paths=PAIRS" in edits:
        write_pairs(pairs)
    for word, path in {"WEIGHTS": given.weights, "PAIRS": pairs, "TOKENIZER": pairs.parent}.items():
        edits = [edit.replace(word, str(path)) for edit in edits]
    if given.tiny:
        sized = ("num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "compile")
        edits = [edit for edit in edits if edit.split("=")[0].split(".")[-1] not in sized and "0." not in edit]
        edits += ["trainer.accelerator=cpu", "data.seq_length=4096" if recipe_name == "dpo" else "data.seq_length=64"]
        edits += [] if recipe_name == "dpo" else ["model.compile=None"]
    recipe = apply_overrides(catalog.find_recipe(recipe_name)(), edits, find=catalog.find_part)
    if recipe.model.config is not None:
        recipe.model.config.seq_length = None
        if recipe.model.config.vocab_size is None:
            recipe.model.config.vocab_size = 50_257
        if given.tiny:
            for field, value in {"num_layers": 2, "hidden_size": 192, "ffn_hidden_size": 96, "vocab_size": 300}.items():
                setattr(recipe.model.config, field, value)
    init_from, recipe.model.init_from = recipe.model.init_from, None
    vocab = 300 if given.tiny else 128_256
    if init_from is not None:
        recipe.model.config = fdl.Config(dict, vocab_size=vocab)
    recipe = as_benchmark(recipe, steps=given.steps, warmup=given.warmup, random_tokens=not on_pairs)
    if init_from is not None:
        recipe.model.config, recipe.model.init_from = None, init_from
    points = given.out / "points.json"
    recipe.trainer.callbacks = [fdl.Config(Points, str(points))]
    recipe.log.dir, recipe.log.name = str(given.out), f"run-{os.getpid() if 'RANK' not in os.environ else name}"
    run = fdl.build(recipe)()
    if int(os.environ.get("RANK", "0")):
        return
    found = json.loads(points.read_text())
    peak = max(point["peak"] for point in found.values() if isinstance(point, dict)) if found.get("total") else 0
    results = {"recipe": recipe_name, "edits": edits, "peak": peak, "mlp": found.pop("mlp"), "points": found}
    (given.out / "case.json").write_text(json.dumps(results | json.loads((run.path / FIGURES).read_text())))


def write_weights(folder: Path, tiny: bool) -> None:
    """A Llama 3 8B of six layers as transformers writes it, with random weights."""
    from arms import accelerator, llama
    from train import SHAPE_8B, TINY
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(accelerator()):
        shape = (TINY | {"vocab": 300} if tiny else SHAPE_8B | {"layers": 6}) | {"T": 4096}
        LlamaForCausalLM(llama(shape)).bfloat16().save_pretrained(folder)


def write_pairs(path: Path) -> None:
    """Pairs of answers of random letters, each of 2,000 tokens, and beside them their tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate("|abcdefgh ")}, "|"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(path.parent / "tokenizer.json"))
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": "|"}))
    letters = random.Random(0)
    with path.open("w") as file:
        for _ in range(400):
            words = {name: "".join(letters.choices("abcdefgh ", k=2000)) for name in ("prompt", "chosen", "rejected")}
            file.write(json.dumps(words | {"prompt": words["prompt"][:50]}) + "\n")


if __name__ == "__main__":
    main()
