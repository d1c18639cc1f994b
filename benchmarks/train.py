"""Trains Llama 3.2 1B on one GPU: fiddlehead, torchtitan, litgpt, and transformers' Trainer with Liger's kernels.

Each arm is a separate process, so its memory and its first step do not depend on the others. All begin with the same
weights and have the same tokens, clipping and AdamW; the benchmark fails unless arms of the same batch and precision
have the same losses. MFU is tokens/s x (6 N + 6 L S C) / the data sheet's peak: causal attention counts half.

    python benchmarks/train.py                                       # all arms
    python benchmarks/train.py --arms fiddlehead:8:bf16-mixed torchtitan:4:bf16-mixed
    python benchmarks/train.py --tiny                                # on a CPU, to try the script

An arm is NAME:BATCH:PRECISION, with options behind, such as fiddlehead:8:bf16-mixed:compile=model,fp8=tensorwise; those
of the others are in peers.py. stream=float32 keeps our residual stream in float32, as theirs is under autocast. With
devices=2 it runs on as many GPUs, of which context_parallel=2 share each sequence; shape=8b is Llama 3 8B.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arms
import peers
import torch
from arms import ADAMW, Arm, Clock, accelerator, batches, on_device
from measure import RESULTS, save, table

BOTH = [f"{name}:{batch}" for batch in (4, 8) for name in ("fiddlehead", "torchtitan", "litgpt", "huggingface")]
ARMS = [f"{arm}:{precision}" for precision in ("bf16-mixed", "bf16-true") for arm in BOTH]
SHAPE = {"layers": 16, "hidden": 2048, "heads": 32, "groups": 8, "ffn": 8192, "vocab": 128_256}
SHAPE_8B = {"layers": 32, "hidden": 4096, "heads": 32, "groups": 8, "ffn": 14336, "vocab": 128_256}
TINY = {"layers": 2, "hidden": 64, "heads": 4, "groups": 2, "ffn": 256, "vocab": 512}
IMPORTS = {
    "fiddlehead": ["fiddlehead.training", "fiddlehead.plan.attention"],
    "torchtitan": ["torch.distributed.fsdp"],
    "litgpt": ["litgpt.model"],
    "huggingface": ["transformers.trainer", "transformers.models.llama.modeling_llama"],
}


def main() -> None:
    """Prints the table and writes `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="NAME:BATCH:PRECISION[:OPTION=VALUE,...]")
    parser.add_argument("--steps", type=int, default=15, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, at least 1")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each arm")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, on a CPU")
    parser.add_argument("--name", default="train", help="of the file of results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warmup < 1:
        parser.error(f"--warmup {arguments.warmup}: at least 1")
    if arguments.child:
        figures = measure(arguments.child, arguments)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as weights:
        commands = {arm: command(arm, arguments, Path(weights)) for arm in arguments.arms}
        figures = arms.run_arms(commands, arguments.timeout)
    rows = [
        [arm, f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}", f"{r['gib']:.1f}", f"{r['first_step_s']:.1f}"]
        for arm, r in figures.items()
        if "failed" not in r
    ]
    print(table(["", "tokens/s", "MFU", "peak GiB", "first step s"], rows))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    save(arguments.name, figures, arms.PACKAGES, {"gpu": gpu}, arguments.out)
    arms.check_losses(figures, alike)


def alike(arm: str) -> tuple[str, ...]:
    """What arms have in common whose losses are the same: the batch, the precision and the options that change them."""
    _, batch, precision, *more = arm.split(":")
    changing = ("accumulate", "shape", "fp8", "fp8_all_gather", "devices", "context_parallel")
    return batch, precision, *(option for option in ",".join(more).split(",") if option.split("=")[0] in changing)


def shape_of(arm: str, arguments: argparse.Namespace) -> dict[str, int]:
    """The shape of an arm's model and batch."""
    sizes = TINY if arguments.tiny else SHAPE_8B if "shape=8b" in arm else SHAPE
    length = min(arguments.seq_length, 64) if arguments.tiny else arguments.seq_length
    return sizes | {"T": length, "B": int(arm.split(":")[1])}


def command(arm: str, arguments: argparse.Namespace, weights: Path) -> list[str]:
    """What runs an arm, which begins with weights below `weights`; it writes them if they are not there."""
    shape = shape_of(arm, arguments)
    folder = weights / str(shape["layers"])
    if not folder.exists():
        arms.write_weights(shape, folder)
    devices = re.search(r"devices=(\d+)", arm)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices[1]}"] if devices else []
    parts = [sys.executable, "-W", "ignore", *start, __file__, "--child", arm, "--weights", str(folder)]
    for name in ("steps", "warmup", "seq_length"):
        parts += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return [*parts, *(["--tiny"] if arguments.tiny else [])]


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm, and returns its figures."""
    program, _, precision, *more = name.split(":")
    options = dict(option.split("=") for option in ",".join(more).split(",") if option)
    options.pop("shape", None)
    accumulate = int(options.pop("accumulate", 1))
    for module in IMPORTS[program]:
        importlib.import_module(module)
    sys.stdin.readline()
    shape = shape_of(name, arguments)
    devices, shared = int(options.get("devices", 1)), int(options.get("context_parallel", 1))
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    clock = Clock(arguments.steps, arguments.warmup)
    arm = Arm(shape, arguments.weights, clock, precision, accumulate, options)
    backend = options.get("attention", "auto")
    (fiddlehead if program == "fiddlehead" else getattr(peers, program))(arm)
    seconds = clock.seconds / arguments.steps
    tokens_per_s = shape["B"] * shape["T"] * accumulate * devices / shared / seconds
    L, C, D = shape["layers"], shape["hidden"], shape["hidden"] // shape["heads"]
    per_layer = C * C * 2 + C * 2 * shape["groups"] * D + 3 * C * shape["ffn"]
    untied = 0 if shape["layers"] <= 16 else shape["vocab"] * C
    flops = 6 * (L * per_layer + shape["vocab"] * C + untied) + 6 * L * shape["T"] * C
    figures: dict[str, Any] = {**on_device(tokens_per_s, flops / devices), "first_step_s": clock.first - began}
    figures["losses"] = clock.losses
    figures |= arm.notes
    if program == "fiddlehead":
        figures["attention"] = attention_kernel(config(shape, backend), precision, shared if devices > 1 else 1)
    return figures


def attention_kernel(config: Any, precision: str, context: int) -> list[str]:
    """What `attend` takes for one of our arms, of whose ranks `context` share each sequence."""
    from fiddlehead.attention import Target
    from fiddlehead.models.autocast import compute_dtype
    from fiddlehead.plan import attention
    from fiddlehead.plan.attention_calls import Calls

    calls = Calls(config=config, dtype=compute_dtype(precision), seq_length=config.seq_length, context=context)
    return attention.rows(attention.choose(calls, Target.of(torch.device(accelerator()))))


def fiddlehead(arm: Arm) -> None:
    """Our LightningModule under Lightning's Trainer, as a recipe has it."""
    from fiddlehead.models import transformer
    from fiddlehead.training import LanguageModel

    options = dict(arm.options)
    if options.pop("stream", "") == "float32":
        transformer.product_dtype = lambda x: torch.float32
    devices, shared = int(options.pop("devices", 1)), int(options.pop("context_parallel", 1))
    shaped = config(arm.shape, options.pop("attention", "auto"))
    chosen: dict[str, Any] = {"compile": "layers" if torch.cuda.is_available() else None} | options
    if "activation_checkpointing" in chosen and chosen["activation_checkpointing"][0].isdigit():
        chosen["activation_checkpointing"] = float(chosen["activation_checkpointing"])
    words = {"None": None, "True": True, "False": False}
    settings: dict[str, Any] = {name: words.get(str(value), value) for name, value in chosen.items()}
    model = LanguageModel(shaped, arm.weights, optim=adamw(), **settings)
    model.take_shape()
    fit(arm, model, devices, shared)
    arm.notes["mlp"] = str(model.mlp)


def config(shape: dict[str, int], backend: str) -> Any:
    """A shape as our configuration, with an attention backend."""
    from fiddlehead.models import TransformerConfig

    return TransformerConfig(
        num_layers=shape["layers"],
        hidden_size=shape["hidden"],
        ffn_hidden_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_query_groups=shape["groups"],
        vocab_size=shape["vocab"],
        seq_length=shape["T"],
        rotary_base=500_000.0,
        share_embeddings_and_output_weights=shape["layers"] <= 16,
        attention_backend=backend,
    )


def adamw(**changes: Any) -> Any:
    """The settings of AdamW for all our arms, at a rate that does not change."""
    from fiddlehead.training import AdamW
    from fiddlehead.training.optim import WarmupStableDecay

    return AdamW(**(ADAMW | changes), lr_scheduler=WarmupStableDecay(decay_fraction=0.0))


def fit(arm: Arm, model: Any, devices: int = 1, shared: int = 1) -> None:
    """Trains a LanguageModel as a recipe's run does."""
    from lightning.pytorch import Callback, LightningDataModule, Trainer

    from fiddlehead.training import Parallel
    from fiddlehead.training.callbacks.garbage import CollectGarbage
    from fiddlehead.training.frozen import halve_frozen

    class Tokens(LightningDataModule):
        token_bytes = tokenizer = None

        def train_dataloader(self) -> Any:
            rank = int(os.environ.get("RANK", "0"))
            for ids, labels in batches(arm.shape, torch.cuda.is_available(), rank // shared):
                yield {"input_ids": ids, "labels": labels}

    class Ticks(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (batch_idx + 1) % arm.accumulate == 0:
                arm.clock(pl_module.take_loss())

    trainer = Trainer(
        accelerator="auto",
        devices=devices,
        strategy=Parallel(context_parallel=shared) if devices > 1 else "auto",
        precision=arm.precision,  # type: ignore[arg-type]
        max_steps=arm.clock.steps,
        use_distributed_sampler=False,
        accumulate_grad_batches=arm.accumulate,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[CollectGarbage(), Ticks()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    halve_frozen(model, trainer)
    trainer.fit(model, datamodule=Tokens())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
