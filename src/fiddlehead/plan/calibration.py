"""Measures what part of its peak a GPU of this machine reaches, for the plans of such GPUs.

The units are those of `fiddlehead.plan.speed`: what is measured here is what it divides by.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from fiddlehead.attention import Target, attend
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files import kept
from fiddlehead.files.paths import cache_folder
from fiddlehead.plan.cards import FORM, Card
from fiddlehead.plan.reached import FILE, REACHED, key_of, measured


@dataclass(frozen=True)
class Work:
    """The sizes of what is measured, and for how many seconds each."""

    seconds: float = 5.0
    """Long enough for the clocks to settle at what the power allows."""
    tokens: int = 8192
    widths: tuple[tuple[int, int], ...] = ((2048, 8192), (4096, 4096), (4096, 14336))
    """Inputs and outputs of the layers whose products are measured."""
    vocabulary: int = 50257
    """Not a multiple of 8."""
    heads: tuple[tuple[int, int, int], ...] = ((32, 8, 64), (32, 8, 128))
    """Heads, groups and channels."""
    length: int = 4096
    parameters: int = 2**29
    """That an optimizer steps: 8 GiB with their gradients and state."""
    exchanged: int = 2**28
    """Bytes that each GPU sends to the others."""


def here() -> tuple[torch.device, Card]:
    """The first GPU of this machine and its card.

    Raises:
        ConfigError: there is none, or its peak is not known.
    """
    if not torch.cuda.is_available():
        message = f"needs a GPU, and {socket.gethostname()} has none; start it where the runs train"
        raise ConfigError(Problem("--calibrate", message=message))
    device = torch.device("cuda", 0)
    card = Card.of(Target.of(device), device)
    if card is None or not card.flops or not card.bytes_per_s:
        name = torch.cuda.get_device_name(device)
        message = f"no data sheet of {name} is known, of which a part could be measured; plan with --gpu {FORM}"
        raise ConfigError(Problem("--calibrate", message=message))
    return device, card


def calibrate(device: torch.device, card: Card, work: Work | None = None, gpus: int = 1) -> dict[str, float]:
    """Measures the parts of a card's peak, by the names of `REACHED`; it takes about a minute.

    Not measured is "fp8". That of other memory-bound work is scaled with the optimizer's, which is limited by the same
    memory.

    Args:
        gpus: of this machine; if there are several, the links between them are measured too.
    """
    work = work or Work()
    forward, backward = _attention(device, card, work)
    optimizer = _optimizer(device, card, work)
    found = {
        "products": _products(device, card, work, work.widths),
        "odd vocabulary": _products(device, card, work, ((work.widths[0][0], work.vocabulary),)),
        "attention, forward": forward,
        "attention, backward": backward,
        "optimizer": optimizer,
        "memory": REACHED["memory"] * optimizer / REACHED["optimizer"],
    }
    if gpus > 1:
        found["link"] = _link(device.type, card, work, gpus)
    return found


def keep(card: Card, found: dict[str, float]) -> Path:
    """Keeps what was measured in the cache folder; from then on plans for such cards use it. Returns the file.

    Raises:
        ConfigError: it cannot be written.
    """
    kept.keep(FILE, key_of(card), found)
    file = cache_folder() / FILE
    if measured(card) != found:
        raise ConfigError(Problem.in_file(file, "cannot be written; name another folder in FIDDLEHEAD_CACHE"))
    return file


def _seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The mean seconds of a call, of so many seconds of calls; two calls before are not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        call()
    wait()
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds or not calls:
        for _ in range(8):  # so that the GPU has work while the host waits for it
            call()
        calls += 8
        wait()
    return passed / calls


def _products(device: torch.device, card: Card, work: Work, widths: tuple[tuple[int, int], ...]) -> float:
    """Of the products of linear layers in both passes."""
    operations, taken = 0.0, 0.0
    for inputs, outputs in widths:
        x = torch.randn(work.tokens, inputs, device=device, dtype=torch.bfloat16)
        w = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        dy = torch.randn(work.tokens, outputs, device=device, dtype=torch.bfloat16)

        def both_passes(x: torch.Tensor = x, w: torch.Tensor = w, dy: torch.Tensor = dy) -> None:
            _ = x @ w.T, dy @ w, dy.T @ x

        taken += _seconds(both_passes, device, work.seconds)
        operations += 6 * work.tokens * inputs * outputs
    return operations / (taken * card.flops)


def _attention(device: torch.device, card: Card, work: Work) -> tuple[float, float]:
    """Of causal attention, forward and backward; the backward pass has five products for two."""
    operations, forward, backward = 0.0, 0.0, 0.0
    for heads, groups, channels in work.heads:
        shape = (max(1, work.tokens // work.length), work.length)
        q, k, v = (
            torch.randn(*shape, count, channels, device=device, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, groups, groups)
        )
        gradient = torch.randn(*shape, heads, channels, device=device, dtype=torch.bfloat16)

        def one_pass(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
            return attend(q, k, v)

        def both_passes(given: tuple[torch.Tensor, ...] = (q, k, v), gradient: torch.Tensor = gradient) -> None:
            torch.autograd.grad(attend(*given), given, gradient)

        once = _seconds(one_pass, device, work.seconds / 2)
        forward += once
        backward += max(_seconds(both_passes, device, work.seconds / 2) - once, 1e-9)
        operations += 2 * shape[0] * work.length**2 * heads * channels
    return operations / (forward * card.flops), 2.5 * operations / (backward * card.flops)


def _optimizer(device: torch.device, card: Card, work: Work) -> float:
    """Of the memory's bandwidth, in clipping and in the step of a fused AdamW."""
    weights = torch.zeros(work.parameters, device=device, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([weights], 1.0)
        optimizer.step()

    moved = 4 * work.parameters * (2 + 4 + 2 * 2)  # as in `speed`: parameters, gradients, two states
    return moved / (_seconds(step, device, work.seconds) * card.bytes_per_s)


def _link(device_type: str, card: Card, work: Work, gpus: int) -> float:
    """Of the link of each GPU, when all gather from all; in a process for each."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        answer = context.SimpleQueue()
        arguments = (device_type, gpus, f"file://{folder}/meeting", work, answer)
        spawn(gather_on_rank, arguments, nprocs=gpus)
        return answer.get() / card.link_bytes_per_s


def gather_on_rank(rank: int, device_type: str, gpus: int, meeting: str, work: Work, answer: Any) -> None:
    """Measures, as one of several processes, the bytes that each receives a second; the first puts it into `answer`."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=gpus)
    try:
        own = torch.zeros(work.exchanged // gpus, device=device, dtype=torch.uint8)
        whole = torch.zeros(own.numel() * gpus, device=device, dtype=torch.uint8)
        calls = 20  # the same on all ranks
        for _ in range(3):
            dist.all_gather_into_tensor(whole, own)
        if device_type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            dist.all_gather_into_tensor(whole, own)
        if device_type == "cuda":
            torch.cuda.synchronize(device)
        passed = time.perf_counter() - start
        if rank == 0:
            answer.put(calls * own.numel() * (gpus - 1) / passed)
    finally:
        dist.destroy_process_group()
