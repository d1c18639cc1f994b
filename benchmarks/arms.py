"""What all arms of a comparison share: weights, tokens, clock, a bare loop; and how they are started and compared."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
PACKAGES = [
    "torch", "triton", "lightning", "transformers", "torchtitan", "litgpt", "liger-kernel", "flash-attn",
    "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl",
]  # fmt: skip
TOLERANCES = {"first": 1e-3, "last": 1e-2}
"""How far apart, relatively, the losses of one comparison may be in the first step and in the last."""


class Clock:
    """Times `steps` steps after `warmup` ones, and keeps their losses: call it after each step."""

    def __init__(self, steps: int, warmup: int = 5) -> None:
        self.steps, self.warmup, self.done = warmup + steps, warmup, 0
        self.first = self.start = self.seconds = 0.0
        self._losses: list[torch.Tensor] = []

    def __call__(self, loss: torch.Tensor) -> None:
        """One more step is done."""
        self.done += 1
        self._losses.append(loss.detach().clone())
        if self.done in (1, self.warmup, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.done == 1:
                self.first = now
            if self.done == self.warmup:
                self.start = now
            self.seconds = now - self.start

    @property
    def losses(self) -> list[float]:
        """The loss of each step, of those before the timed ones too."""
        return [float(loss) for loss in self._losses]


@dataclass
class Arm:
    """What one process trains.

    Args:
        shape: the model's sizes, `T` tokens a sequence and `B` sequences a micro-batch.
        weights: a folder in Hugging Face's format.
        accumulate: micro-batches a step.
    """

    shape: dict[str, int]
    weights: Path
    clock: Clock
    precision: str = "bf16-mixed"
    accumulate: int = 1
    options: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    """What an arm says of itself, beside its figures."""

    @property
    def device(self) -> str:
        """The kind of device that all arms train on."""
        return accelerator()

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `batches`, on the device."""
        for pair in batches(self.shape, self.device == "cuda"):
            yield tuple(tokens.to(self.device, non_blocking=True) for tokens in pair)  # type: ignore[misc]

    def autocast(self) -> Any:
        """Mixed precision as PyTorch has it; with bfloat16 weights nothing."""
        mixed = self.precision == "bf16-mixed"
        return torch.autocast(self.device, dtype=torch.bfloat16) if mixed else nullcontext()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by Hugging Face's names, in the parameters' type, on the device."""
        from safetensors.torch import load_file

        files = sorted(self.weights.glob("*.safetensors"))
        return {
            name: tensor.to(self.dtype)
            for file in files
            for name, tensor in load_file(file, device=self.device).items()
        }


def accelerator() -> str:
    """The kind of device that all arms train on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def batches(shape: dict[str, int], pinned: bool, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens and the next ones, without end; low ids are more frequent, so the loss falls as a model learns."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.rand((shape["B"], shape["T"] + 1), generator=generator).pow_(4).mul_(shape["vocab"]).long()
        pair = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        yield (pair[0].pin_memory(), pair[1].pin_memory()) if pinned else pair


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
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=shape["layers"] <= 16,
        use_cache=False,
        **more,
    )


def write_weights(shape: dict[str, int], folder: Path) -> None:
    """Writes a Llama with random weights in bfloat16, as transformers does, where every arm begins.

    In a process of its own: this one would keep the memory of the GPU, and the arms would have less.
    """
    process = get_context("spawn").Process(target=_write_weights, args=(shape, folder))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the weights could not be written to {folder}")


def _write_weights(shape: dict[str, int], folder: Path) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(accelerator()):
        LlamaForCausalLM(llama(shape)).bfloat16().save_pretrained(folder)


def on_device(tokens_per_s: float, flops: float) -> dict[str, float]:
    """The rate, what part of this device's peak it takes with so many FLOPs a token, and the peak of memory."""
    on_gpu = torch.cuda.is_available()
    peak = next((p for n, p in PEAK.items() if on_gpu and n in torch.cuda.get_device_name()), float("inf"))
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * flops / peak, "gib": gib}


def run_arms(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, dict[str, Any]]:
    """The figures that each command prints last, or why it `failed`; one at a time measures.

    The next one is started early: it imports what it needs, then waits for a line on its standard input.
    """

    def start(name: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(commands[name], stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    names, figures = list(commands), {}
    waiting = start(names[0])
    for i, name in enumerate(names):
        child = waiting
        if i + 1 < len(names):
            waiting = start(names[i + 1])
        try:
            out, err = child.communicate("\n", timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            err += f"\nnot done after {timeout:g} s"
        lines = out.strip().splitlines()
        figures[name] = json.loads(lines[-1]) if child.returncode == 0 else {"failed": err.strip()[-500:]}
        print(name, figures[name], file=sys.stderr, flush=True)
    return figures


def check_losses(figures: Mapping[str, Mapping[str, Any]], alike: Callable[[str], object]) -> None:
    """Ends the benchmark unless arms that are `alike` had the same losses: timings of other work compare nothing."""
    groups: dict[object, dict[str, list[float]]] = {}
    for name, figure in figures.items():
        if "failed" not in figure:
            groups.setdefault(alike(name), {})[name] = figure["losses"]
    for losses in groups.values():
        for step, tolerance in TOLERANCES.items():
            values = [each[0 if step == "first" else -1] for each in losses.values()]
            if not all(value - min(values) <= tolerance * min(values) for value in values):  # so NaN does not pass
                raise SystemExit(f"the {step} losses differ by more than {tolerance:g}: {losses}")


def keep_garbage() -> None:
    """Switches Python's garbage collector off, as torchtitan's trainer and ours do."""
    gc.collect()
    gc.freeze()
    gc.disable()


def loop(
    arm: Arm,
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    clip: Callable[..., Any] = torch.nn.utils.clip_grad_norm_,
) -> None:
    """Trains in a bare loop; `loss_of` takes tokens and the next ones."""
    parameters = list(parameters)
    optimizer = optimizer or torch.optim.AdamW(parameters, **ADAMW, fused=True)
    source = arm.batches()
    keep_garbage()
    while arm.clock.done < arm.clock.steps:
        total = torch.zeros((), device=arm.device)
        for _ in range(arm.accumulate):
            loss = loss_of(*next(source)) / arm.accumulate
            loss.backward()
            total += loss.detach()
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        arm.clock(total)
