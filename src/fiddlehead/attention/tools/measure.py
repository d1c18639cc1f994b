"""`attention_backend="measured"`: times the candidates once on this device and keeps the fastest.

The outcome is kept in `attention.json` of the cache folder (`$FIDDLEHEAD_CACHE`, or `~/.cache/fiddlehead`), under the
device, the versions of every package with kernels, the spec, and the lengths rounded up to powers of two. Delete the
file to measure again.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch

from fiddlehead.attention.backends import BACKENDS
from fiddlehead.attention.backends.backend import LAST_RESORT, Backend, Extras
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.attention.tools.sample import Inputs, Shape, sample
from fiddlehead.files import kept

logger = logging.getLogger(__name__)

ROUNDS = 5
SECONDS_PER_ROUND = 0.02

FILE = "attention.json"


def contenders(candidates: Iterable[str]) -> list[str]:
    """The names of the backends to time: all except last resorts, or the last resorts if there are no others.

    Last resorts are never the fastest, and FlexAttention takes long to compile.
    """
    names = list(candidates)
    return [name for name in names if name not in BACKENDS or BACKENDS[name].PLACE < LAST_RESORT] or names


def fastest(
    candidates: dict[str, Backend], spec: AttentionSpec, target: Target, device: torch.device, shape: Shape
) -> str:
    """The name of the fastest candidate for `spec` in `shape`: forward, and backward in training.

    One that fails is left out with a warning.
    """
    fast = {name: candidates[name] for name in contenders(candidates)}
    if len(fast) == 1:
        return next(iter(fast))
    key = _key(spec, target, shape, fast)
    times = kept.read(FILE).get(key)
    if times is None:
        times = _measure(fast, spec, device, shape)
        if not times:  # the call itself will say what is wrong
            return next(iter(fast))
        kept.keep(FILE, key, times)
    return min(times, key=lambda name: times[name])


def _measure(
    candidates: dict[str, Backend], spec: AttentionSpec, device: torch.device, shape: Shape
) -> dict[str, float]:
    """Milliseconds of each candidate that works."""
    times: dict[str, float] = {}
    inputs, extras = sample(spec, device, shape)
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
    """The median time of a step, after enough steps for compilation and warm-up."""
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


def _key(spec: AttentionSpec, target: Target, shape: Shape, candidates: dict[str, Backend]) -> str:
    """Everything on which the times depend, as text."""
    sizes = [1 << (size - 1).bit_length() for size in (shape.batch, shape.length_q, shape.length_k)]
    facts = {**asdict(spec), "dtype": str(spec.dtype), "sizes": sizes, "candidates": list(candidates)}
    return json.dumps({"device": target.name, "packages": asdict(target.packages), **facts}, sort_keys=True)
