"""`attention_backend="measured"`: the candidates are timed once on this device, and the fastest is kept.

The outcome is kept in `attention.json` of the cache folder (`$FIDDLEHEAD_CACHE`, or `~/.cache/fiddlehead`), under the
device, the versions of every package with kernels, the spec, and the lengths rounded up to powers of two. Delete the
file to measure again.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fiddlehead.attention.backend import Backend, Extras
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.environment import cache_folder

logger = logging.getLogger(__name__)

LAST_RESORTS = ("flex", "reference")
"""Timed only if no other candidate is there: they are never the fastest then, and the first takes long to compile."""
ROUNDS = 5
SECONDS_PER_ROUND = 0.02

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Shape(NamedTuple):
    """The sizes of one call that a spec leaves open."""

    batch: int
    """Sequences; of a packed call as many as of the longest would hold its tokens."""
    length_q: int
    length_k: int


def fastest(
    candidates: dict[str, Backend], spec: AttentionSpec, target: Target, device: torch.device, shape: Shape
) -> str:
    """The name of the candidate that takes the least time for `spec` in `shape`: forward, and backward in training.

    One that fails is left out with a warning.
    """
    fast = {name: backend for name, backend in candidates.items() if name not in LAST_RESORTS} or candidates
    if len(fast) == 1:
        return next(iter(fast))
    key = _key(spec, target, shape, fast)
    times = _read().get(key)
    if times is None:
        times = _measure(fast, spec, device, shape)
        if not times:  # the call itself will say what is wrong
            return next(iter(fast))
        _keep(key, times)
    return min(times, key=lambda name: times[name])


def _measure(
    candidates: dict[str, Backend], spec: AttentionSpec, device: torch.device, shape: Shape
) -> dict[str, float]:
    """Milliseconds of each candidate that works."""
    times: dict[str, float] = {}
    inputs, extras = _inputs(spec, device, shape)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):  # dropout draws numbers
        for name, backend in candidates.items():
            try:
                times[name] = _milliseconds(_step(backend, inputs, spec, extras), device)
            except Exception as error:  # whatever a kernel raises; memory that does not suffice, for one
                logger.warning("attention: %s is left out, its timing failed: %s", name, str(error).partition("\n")[0])
    listed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    logger.info("attention: measured for %s, %s: %s", spec, shape, listed)
    return times


def _step(backend: Backend, inputs: Inputs, spec: AttentionSpec, extras: Extras) -> Callable[[], object]:
    """One call as training or inference makes it."""
    scale = spec.head_dim**-0.5
    if not spec.training:

        def forward() -> object:
            with torch.no_grad():
                return backend.run(*inputs, spec, scale, extras)

        return forward
    gradient = torch.ones_like(inputs[0])

    def forward_and_backward() -> object:
        with torch.enable_grad():
            out = backend.run(*inputs, spec, scale, extras)
            return torch.autograd.grad(out, inputs, gradient)

    return forward_and_backward


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """The median time of a step, after enough of them to have compiled and warmed up what there is."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        step()
    wait()
    start = time.perf_counter()
    step()
    wait()
    steps = max(1, int(SECONDS_PER_ROUND / max(time.perf_counter() - start, 1e-6)))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        rounds.append((time.perf_counter() - start) / steps)
    return statistics.median(rounds) * 1e3


def _inputs(spec: AttentionSpec, device: torch.device, shape: Shape) -> tuple[Inputs, Extras]:
    """q, k and v with the sizes of the call, and what else it has."""
    B, T, S = shape.batch, shape.length_q, shape.length_k
    H, G, D = spec.num_attention_heads, spec.num_query_groups, spec.head_dim
    generator = torch.Generator(device).manual_seed(0)  # its own: the model's numbers must not depend on a timing
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}

    def draw(*size: int) -> torch.Tensor:
        made = torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(spec.dtype)
        return made.requires_grad_(spec.training)

    extras = Extras(
        padding_mask=torch.ones(B, S, dtype=torch.bool, device=device) if spec.padding_mask else None,
        alibi_slopes=torch.linspace(0.01, 1, H, device=device) if spec.alibi else None,
        sinks=torch.zeros(H, device=device, dtype=spec.dtype) if spec.sinks else None,
    )
    if spec.packed:
        extras = extras._replace(
            cu_seqlens_q=torch.arange(0, B + 1, **int32) * T,
            cu_seqlens_k=torch.arange(0, B + 1, **int32) * S,
            max_seqlen_q=T,
            max_seqlen_k=S,
        )
        return (draw(B * T, H, D), draw(B * S, G, D), draw(B * S, G, D)), extras
    if spec.cached:
        extras = extras._replace(cache_lengths=torch.full((B,), S, **int32))
    if spec.page_size:
        pages = -(-S // spec.page_size)
        extras = extras._replace(page_table=torch.arange(B * pages, **int32).view(B, pages))
        stored = (B * pages, spec.page_size, G, D)
        return (draw(B, T, H, D), draw(*stored), draw(*stored)), extras
    return (draw(B, T, H, D), draw(B, S, G, D), draw(B, S, G, D)), extras


# -- what was measured before


def _file() -> Path:
    return cache_folder() / "attention.json"


def _key(spec: AttentionSpec, target: Target, shape: Shape, candidates: dict[str, Backend]) -> str:
    """All that the times depend on, as text."""
    sizes = [1 << (size - 1).bit_length() for size in (shape.batch, shape.length_q, shape.length_k)]
    facts = {**asdict(spec), "dtype": str(spec.dtype), "sizes": sizes, "candidates": list(candidates)}
    return json.dumps({"device": target.name, "packages": asdict(target.packages), **facts}, sort_keys=True)


def _read() -> dict[str, dict[str, float]]:
    try:
        return json.loads(_file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("attention: %s cannot be read and is begun anew: %s", _file(), error)
        return {}


def _keep(key: str, times: dict[str, float]) -> None:
    """Adds an outcome; a folder that cannot be written costs another measurement next time, not the run."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read(), key: times}, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("attention: the measured times are not kept: %s", error)
