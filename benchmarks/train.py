"""Trains Llama 3.2 1B on one GPU: fiddlehead, torchtitan's and litgpt's models, and Hugging Face on Lightning.

Each arm is a separate process, so its memory and its first step do not depend on the others. All have the same shape,
tokens, clipping and AdamW. MFU is tokens/s x (6 N + 6 L S C) / the data sheet's peak: causal attention counts half.

    python benchmarks/train.py                                       # all arms
    python benchmarks/train.py --arms fiddlehead:8:bf16-mixed torchtitan:4:bf16-mixed
    python benchmarks/train.py --tiny                                # on a CPU, to try the script

An arm is NAME:BATCH:PRECISION, with options behind, such as fiddlehead:8:bf16-mixed:compile=model,fp8=tensorwise. With
devices=2 it runs on as many GPUs, of which context_parallel=2 share each sequence; shape=8b is Llama 3 8B.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, save, table

ARMS = [
    "fiddlehead:4:bf16-mixed",
    "fiddlehead:8:bf16-mixed",
    "fiddlehead:8:bf16-mixed:accumulate=4",
    "fiddlehead:8:bf16-true",
    "fiddlehead:12:bf16-true",
    "fiddlehead:8:bf16-mixed:fp8=tensorwise",
    "torchtitan:4:bf16-mixed",
    "litgpt:4:bf16-true",
    "huggingface:4:bf16-true",
    "huggingface:2:bf16-mixed:compile=model",
]
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SHAPE = {"layers": 16, "hidden": 2048, "heads": 32, "groups": 8, "ffn": 8192, "vocab": 128_256}
SHAPE_8B = {"layers": 32, "hidden": 4096, "heads": 32, "groups": 8, "ffn": 14336, "vocab": 128_256}
TINY = {"layers": 2, "hidden": 64, "heads": 4, "groups": 2, "ffn": 256, "vocab": 512}


def main() -> None:
    """Prints the table and writes `results/train.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="NAME:BATCH:PRECISION[:OPTION=VALUE,...]")
    parser.add_argument("--steps", type=int, default=15, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, at least 1")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warmup < 1:
        parser.error(f"--warmup {arguments.warmup}: at least 1")
    if arguments.child:
        figures = measure(arguments.child, arguments)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(figures))
        return
    figures: dict[str, Any] = {}
    for arm in arguments.arms:
        devices = re.search(r"devices=(\d+)", arm)
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices[1]}"] if devices else []
        command = [sys.executable, "-W", "ignore", *start, __file__, "--child", arm]
        for name in ("steps", "warmup", "seq_length"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        command += ["--tiny"] if arguments.tiny else []
        figures[arm] = run_arm(arm, command)
    rows = [
        [arm, f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}", f"{r['gib']:.1f}", f"{r['first_step_s']:.1f}"]
        for arm, r in figures.items()
        if "failed" not in r
    ]
    print(table(["", "tokens/s", "MFU", "peak GiB", "first step s"], rows))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    save("train", figures, ["torch", "lightning"], {"gpu": gpu}, arguments.out)


def run_arm(arm: str, command: list[str]) -> dict[str, Any]:
    """The figures that a process prints last, or why it `failed`."""
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    figures = json.loads(last) if done.returncode == 0 else {"failed": done.stderr.strip()[-400:] or last}
    print(arm, figures, file=sys.stderr, flush=True)
    return figures


def measure(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm, and returns its figures."""
    name, batch, precision, *more = arm.split(":")
    options = dict(option.split("=") for option in ",".join(more).split(",") if option)
    shape = TINY if arguments.tiny else SHAPE_8B if options.pop("shape", "1b") == "8b" else SHAPE
    devices, shared = int(options.get("devices", 1)), int(options.get("context_parallel", 1))
    shape = shape | {"T": min(arguments.seq_length, 64) if arguments.tiny else arguments.seq_length, "B": int(batch)}
    accumulate = int(options.pop("accumulate", 1))
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    run = {"fiddlehead": fiddlehead, "torchtitan": torchtitan, "litgpt": litgpt, "huggingface": huggingface}[name]
    clock = Clock(arguments.steps, arguments.warmup)
    backend = options.get("attention", "auto")
    loss = run(shape, precision, options, accumulate, clock)
    seconds = clock.seconds / arguments.steps
    tokens_per_s = shape["B"] * shape["T"] * accumulate * devices / shared / seconds
    L, C, D = shape["layers"], shape["hidden"], shape["hidden"] // shape["heads"]
    per_layer = C * C * 2 + C * 2 * shape["groups"] * D + 3 * C * shape["ffn"]
    untied = 0 if shape["layers"] <= 16 else shape["vocab"] * C
    flops = 6 * (L * per_layer + shape["vocab"] * C + untied) + 6 * L * shape["T"] * C
    ours = name == "fiddlehead"
    kernel = (
        {"attention": attention_kernel(config(shape, backend), precision, shared if devices > 1 else 1)} if ours else {}
    )
    return {**on_device(tokens_per_s, flops / devices), "first_step_s": clock.first - began, "loss": loss, **kernel}


def on_device(tokens_per_s: float, flops: float) -> dict[str, float]:
    """The rate, what part of this device's peak it takes with so many FLOPs a token, and the peak of memory."""
    on_gpu = torch.cuda.is_available()
    peak = next((p for n, p in PEAK.items() if on_gpu and n in torch.cuda.get_device_name()), float("inf"))
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * flops / peak, "gib": gib}


def attention_kernel(config: Any, precision: str, context: int) -> list[str]:
    """What `attend` takes for one of our arms, of whose ranks `context` share each sequence."""
    from fiddlehead.attention import Target
    from fiddlehead.plan import attention
    from fiddlehead.plan.attention_calls import Calls, compute_dtype

    calls = Calls(config=config, dtype=compute_dtype(precision), seq_length=config.seq_length, context=context)
    return attention.rows(attention.choose(calls, Target.of(torch.device(accelerator()))))


class Clock:
    """Times `steps` steps after `warmup` ones: call it after each."""

    def __init__(self, steps: int, warmup: int = 5) -> None:
        self.steps, self.warmup, self.done = warmup + steps, warmup, 0
        self.first = self.start = self.seconds = 0.0

    def __call__(self) -> None:
        """One more step is done."""
        self.done += 1
        if self.done in (1, self.warmup, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.done == 1:
                self.first = now
            if self.done == self.warmup:
                self.start = now
            self.seconds = now - self.start


def batches(shape: dict[str, int], device: str, seed: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens and the next ones, without end; a new batch each time, on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    while True:
        size = (shape["B"], shape["T"] + 1)
        tokens = torch.randint(shape["vocab"], size, device=device, generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def fiddlehead(shape: dict[str, int], precision: str, options: dict[str, str], accumulate: int, clock: Clock) -> float:
    """Our LightningModule under Lightning's Trainer, as a recipe has it."""
    from fiddlehead.training import LanguageModel

    devices, shared = int(options.pop("devices", 1)), int(options.pop("context_parallel", 1))
    shaped = config(shape, options.pop("attention", "auto"))
    chosen: dict[str, Any] = {"compile": "layers" if torch.cuda.is_available() else None} | options
    if "activation_checkpointing" in chosen and chosen["activation_checkpointing"][0].isdigit():
        chosen["activation_checkpointing"] = float(chosen["activation_checkpointing"])
    model = LanguageModel(shaped, **{k: None if v == "None" else v for k, v in chosen.items()})
    return fit(model, 3e-4, shape, precision, clock, accumulate, devices, shared)


def config(shape: dict[str, int], backend: str) -> Any:
    """A shape as our configuration, with an attention backend."""
    from fiddlehead.models import RopeScaling, TransformerConfig

    return TransformerConfig(
        num_layers=shape["layers"],
        hidden_size=shape["hidden"],
        ffn_hidden_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_query_groups=shape["groups"],
        vocab_size=shape["vocab"],
        seq_length=shape["T"],
        rotary_base=500_000.0,
        rope_scaling=RopeScaling(scale_factor=32.0),
        share_embeddings_and_output_weights=shape["layers"] <= 16,
        attention_backend=backend,
    )


def fit(
    model: Any,
    lr: float,
    shape: dict[str, int],
    precision: str,
    clock: Clock,
    accumulate: int = 1,
    devices: int = 1,
    shared: int = 1,
) -> float:
    """Trains a LanguageModel as a recipe's run does, on random tokens; returns the last loss."""
    from lightning.pytorch import Callback, LightningDataModule, Trainer

    from fiddlehead.training import AdamW, Parallel
    from fiddlehead.training.callbacks.garbage import CollectGarbage
    from fiddlehead.training.frozen import halve_frozen

    class Tokens(LightningDataModule):
        token_bytes = None

        def train_dataloader(self) -> Any:
            pinned = torch.cuda.is_available()
            for ids, labels in batches(shape, "cpu", int(os.environ.get("RANK", "0")) // shared):
                yield (
                    {"input_ids": ids.pin_memory(), "labels": labels.pin_memory()}
                    if pinned
                    else {
                        "input_ids": ids,
                        "labels": labels,
                    }
                )

    class Ticks(Callback):
        loss = torch.zeros(())

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (batch_idx + 1) % accumulate == 0:
                self.loss = pl_module.take_loss()
                clock()

    model.optim = AdamW(lr=lr)
    ticks = Ticks()
    trainer = Trainer(
        accelerator="auto",
        devices=devices,
        strategy=Parallel(context_parallel=shared) if devices > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_steps=clock.steps,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[CollectGarbage(), ticks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    halve_frozen(model, trainer)
    trainer.fit(model, datamodule=Tokens())
    return float(ticks.loss)


def torchtitan(shape: dict[str, int], precision: str, options: dict[str, str], accumulate: int, clock: Clock) -> float:
    """torchtitan 0.2's Llama 3, its blocks compiled as it does, in a bare loop."""
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    args = TransformerModelArgs(
        dim=shape["hidden"],
        n_layers=shape["layers"],
        n_heads=shape["heads"],
        n_kv_heads=shape["groups"],
        vocab_size=shape["vocab"],
        multiple_of=256,
        ffn_dim_multiplier=shape["ffn"] * 3 / (8 * shape["hidden"]),
        rope_theta=500_000,
        max_seq_len=shape["T"],
    )
    with torch.device(accelerator()):
        model = Transformer(args)
        model.init_weights()
    model.output.weight = model.tok_embeddings.weight
    assert model.layers["0"].feed_forward.w1.out_features == shape["ffn"]
    for block in model.layers.values():
        block.compile(fullgraph=True)
    cross_entropy = torch.compile(_cross_entropy)
    return loop(model, lambda ids, labels: cross_entropy(model(ids), labels), shape, precision, accumulate, clock)


def litgpt(shape: dict[str, int], precision: str, options: dict[str, str], accumulate: int, clock: Clock) -> float:
    """litgpt's GPT, compiled whole, with its loss in chunks, in a bare loop."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    settings = Config(
        name="twin",
        block_size=shape["T"],
        padded_vocab_size=shape["vocab"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_query_groups=shape["groups"],
        n_embd=shape["hidden"],
        intermediate_size=shape["ffn"],
        rotary_percentage=1.0,
        rope_base=500_000,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    with torch.device(accelerator()):
        model = GPT(settings)
        model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    compiled = torch.compile(model)

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(compiled(ids), labels, chunk_size=0)

    return loop(model, loss, shape, precision, accumulate, clock)


def llama(shape: dict[str, int], **more: Any) -> Any:
    """A shape as transformers' configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        vocab_size=shape["vocab"],
        max_position_embeddings=shape["T"],
        tie_word_embeddings=True,
        **more,
    )


def huggingface(shape: dict[str, int], precision: str, options: dict[str, str], accumulate: int, clock: Clock) -> float:
    """transformers' Llama as a LightningModule under Lightning's Trainer."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from transformers import LlamaForCausalLM

    settings = llama(shape, attn_implementation="sdpa")

    class Module(LightningModule):
        def configure_model(self) -> None:
            self.model = LlamaForCausalLM(settings)
            self.run = torch.compile(self.model) if options.get("compile") else self.model

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            ids, labels = batch
            return _cross_entropy(self.run(ids).logits, labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:  # Lightning's refuses a fused AdamW
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    class Ticks(Callback):
        loss = torch.zeros(())

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.loss = outputs["loss"]
            clock()

    ticks = Ticks()
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=clock.steps,
        logger=False,
        callbacks=[ticks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), train_dataloaders=batches(shape, accelerator()))
    return float(ticks.loss)


def loop(
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: dict[str, int],
    precision: str,
    accumulate: int,
    clock: Clock,
) -> float:
    """Trains in a bare loop, with the same clipping and optimizer as the others."""
    if precision == "bf16-true":
        model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    source = batches(shape, accelerator())
    loss = torch.zeros(())
    gc.collect()
    gc.freeze()
    gc.disable()  # as torchtitan's own trainer and ours do
    while clock.done < clock.steps:
        for _ in range(accumulate):
            ids, labels = next(source)
            with torch.autocast(accelerator(), dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = loss_of(ids, labels)
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock()
    return float(loss)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def accelerator() -> str:
    """The kind of device that all arms train on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
