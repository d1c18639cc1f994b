"""Tries a kernel on a small call, forward and backward, and compares it with the reference in float64.

A kernel can be wrong without an error, only in its gradients or only for some head dims. A trial uses the dtype, heads,
head dim and mask of the later calls, and lengths that fill no tile of any kernel.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch

import fiddlehead
from fiddlehead.attention import parts
from fiddlehead.attention.backends import BACKENDS
from fiddlehead.attention.backends.backend import Extras
from fiddlehead.attention.spec import AttentionSpec, Target, length_class
from fiddlehead.attention.tools.sample import Inputs, Shape, sample
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files import kept

LIMITS = {torch.float16: 0.01, torch.bfloat16: 0.02, torch.float32: 1e-4}
"""The limit of the relative error of an output or gradient; a working kernel has a tenth of it."""

QUERIES, KEYS = 201, 333
"""Lengths of a trial's sequences; if a call has as many queries as keys, both are `KEYS`."""
WINDOW = 100
"""The widest window of a trial, so that it leaves keys out."""
FILE = "attention_trials.json"
"""The file in the cache folder with the results of trials, by device, versions, backend and spec."""

Errors = dict[str, float]
"""The relative error (of norms) of the output "out" and, in training, of each gradient: "dq", "dk", "dv", "dsinks"; for
passes by themselves also of the logarithms of the softmaxes' sums, "lse"."""


def require_right(backend: str, spec: AttentionSpec, target: Target, device: torch.device) -> Errors:
    """Tries a backend, unless an earlier process did so with this device, these versions and this spec.

    Raises:
        ConfigError: its output or a gradient is wrong.
    """
    spec = _small(spec)
    versions = {"fiddlehead": fiddlehead.__version__, **asdict(target.packages)}
    call = {**asdict(spec), "dtype": str(spec.dtype)}
    key = json.dumps({"device": target.name, "versions": versions, "backend": backend, **call}, sort_keys=True)
    errors = kept.read(FILE).get(key)
    if errors is None:
        errors = trial(backend, spec, device)
        if not wrong(errors, spec):  # what is wrong is tried again: it may have been mended without a new version
            kept.keep(FILE, key, errors)
    if problem := wrong(errors, spec):
        message = f"is wrong on {target.name} for {spec}: {problem}; choose another backend, or see `fiddlehead doctor`"
        raise ConfigError(Problem("attention_backend", backend, message))
    return errors


def wrong(errors: Errors, spec: AttentionSpec) -> str | None:
    """Which errors are above the limit; None if none is."""
    limit = LIMITS[spec.dtype]
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit)  # NaN is not
    return f"relative error of {listed}, above {limit:.0e}" if listed else None


def trial(backend: str, spec: AttentionSpec, device: torch.device) -> Errors:
    """The errors of a small call. It raises whatever the kernel raises."""
    spec = _small(spec)
    inputs, extras = _call(spec, device)
    exact = replace(spec, dtype=torch.float64)
    with torch.autocast(device.type, enabled=False):
        # Reuses q's numbers in another order: drawing new ones would advance the generator of the model's weights.
        gradient = inputs[0].detach().flip(0, 1)
        got = _outcome(backend, inputs, spec, extras, gradient)
        wanted = _outcome("reference", tuple(x.double() for x in inputs), exact, extras, gradient.double())
    return {name: float((got[name].double() - right).norm() / right.norm()) for name, right in wanted.items()}


def _small(spec: AttentionSpec) -> AttentionSpec:
    """The spec of a trial: with the trial's lengths, and without dropout, which has no exact result."""
    left, right = spec.window_size
    return replace(spec, dropout=0.0, window_size=(min(left, WINDOW), min(right, WINDOW)), length=length_class(KEYS))


def _call(spec: AttentionSpec, device: torch.device) -> tuple[Inputs, Extras]:
    """A sample whose mask, borders and sinks differ between sequences."""
    T, S = KEYS if spec.same_length else QUERIES, KEYS
    inputs, extras = sample(spec, device, Shape(2, T, S))
    generator = torch.Generator().manual_seed(0)
    if spec.padding_mask:
        extras = extras._replace(padding_mask=(torch.rand(2, S, generator=generator) < 0.7).to(device))
    if spec.sinks:
        extras = extras._replace(
            sinks=torch.randn(spec.num_attention_heads, generator=generator).to(device, spec.dtype)
        )
    if spec.packed:
        shift = T // 3
        at_q, at_k = ([0, n - shift, 2 * n] for n in (T, S))
        if spec.by_passes and not spec.causal:  # some documents have only queries, or only keys, in a part
            at_q, at_k = [0, 9, 9, 2 * T], [0, 0, 9, 2 * S]
        borders = (torch.tensor(at, dtype=torch.int32, device=device) for at in (at_q, at_k))
        longest = (max(b - a for a, b in pairwise(at)) for at in (at_q, at_k))
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        extras = extras._replace(**dict(zip(names, (*borders, *longest), strict=True)))
    return inputs, extras


def _outcome(
    backend: str, inputs: tuple[torch.Tensor, ...], spec: AttentionSpec, extras: Extras, gradient: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output and the gradients by name."""
    leaves = {name: x.detach().requires_grad_(spec.training) for name, x in zip("qkv", inputs, strict=True)}
    if extras.sinks is not None:
        leaves["sinks"] = extras.sinks.detach().to(spec.dtype).requires_grad_(spec.training)
        extras = extras._replace(sinks=leaves["sinks"])
    scale = spec.head_dim**-0.5
    if spec.by_passes:
        return _outcome_of_part(backend, inputs, spec, scale, extras, gradient)
    with torch.set_grad_enabled(spec.training):
        out = BACKENDS[backend].run(leaves["q"], leaves["k"], leaves["v"], spec, scale, extras)
    outcome: dict[str, Any] = {"out": out.detach()}
    if spec.training:
        gradients = torch.autograd.grad(out, list(leaves.values()), gradient)
        outcome |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return outcome


def _outcome_of_part(
    backend: str,
    inputs: tuple[torch.Tensor, ...],
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
    gradient: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The same of the two passes by themselves, and the logarithms of the softmaxes' sums as "lse"."""
    q, k, v = (x.detach() for x in inputs)
    out, lse = parts.forward(BACKENDS[backend], q, k, v, spec, scale, extras)
    outcome = {"out": out, "lse": lse.masked_fill(lse.isinf(), 0.0)}
    if spec.training:
        lse = lse.masked_fill(lse.isinf(), float("inf"))
        gradients = parts.backward(BACKENDS[backend], gradient, q, k, v, out, lse, spec, scale, extras)
        outcome |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return outcome
