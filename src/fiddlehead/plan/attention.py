"""The attention kernel of each layer of a run, for its plan and its record."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fiddlehead.attention import BACKENDS, GPUS, AttentionSpec, Choice, Package, Packages, Target, explain, watched
from fiddlehead.attention.packages import CUDNN_OF_CUDA_BUILDS, NEWEST_KNOWN
from fiddlehead.attention.tools.measure import contenders
from fiddlehead.attention.tools.trial import LIMITS, Errors, require_right
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.plan.attention_calls import TRAINING, Calls


class Served(NamedTuple):
    """Layers whose calls have one spec, and the kernel that serves them."""

    layers: tuple[int, ...]
    """Their indices."""
    choice: Choice
    during: str
    """The pass: `TRAINING`, `VALIDATION` or `COMPARISON`."""
    lengths: tuple[int, ...]
    """The lengths of the longest sequence in these calls, the greatest first. With separate documents, they differ
    between batches."""
    layers_by_pipeline_rank: tuple[tuple[int, ...], ...]
    """The layers that each rank of the pipeline has; without a pipeline, one rank has all of them."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, with those of `Choice.to_dict`."""
        fields = {name: value for name, value in self._asdict().items() if name != "choice"}
        return {**fields, **self.choice.to_dict()}


Choices = tuple[Served, ...]
"""All calls of a run; its steps on the longest sequences come first."""


def explain_calls(calls: Calls, target: Target) -> Choices:
    """The kernel for each different call of a run on `target`, if any."""
    name = calls.config.attention_backend
    return tuple(
        Served(layers, explain(spec, target, name), during, lengths, calls.on_pipeline_ranks(layers))
        for during, spec, layers, lengths in calls.specs()
    )


def choose(calls: Calls, target: Target) -> Choices:
    """The kernels that a run takes on `target`.

    Raises:
        ConfigError: no backend can serve a layer, or the one named cannot; it lists every reason.
    """
    chosen = explain_calls(calls, target)
    refused: dict[str, ConfigError] = {}
    for served in chosen:
        try:
            served.choice.required()
        except ConfigError as error:
            refused.setdefault(str(served.choice.reasons), error)
    if refused:
        raise ConfigError(*(problem for error in refused.values() for problem in error.problems))
    return chosen


def on_longest(chosen: Choices) -> Choices:
    """The choices of a run's steps on the longest sequences; every layer is in one of them."""
    return tuple(served for served in chosen if served.during == TRAINING and served.lengths[0] == chosen[0].lengths[0])


def share(chosen: Choices, backend: str) -> float:
    """The part of the layers that this backend serves in the steps on the longest sequences; 0 if nothing is known."""
    layers = {layer: served.choice.backend for served in on_longest(chosen) for layer in served.layers}
    return sum(each == backend for each in layers.values()) / max(1, len(layers))


def refuse_impossible(calls: Calls) -> None:
    """Refuses a named backend that no GPU could run, for a run on an unknown machine.

    Raises:
        ConfigError: with each different reason.
    """
    name = calls.config.attention_backend
    if name not in BACKENDS:
        return
    newest = {package: Package(version) for package, version in NEWEST_KNOWN.items()}
    packages = Packages(torch.__version__, CUDNN_OF_CUDA_BUILDS, **newest)
    for _, spec, _, _ in calls.specs():
        choices = [explain(spec, Target.gpu(gpu, packages), name) for gpu in GPUS]
        if not any(choice.backend for choice in choices):
            reasons = "; ".join(dict.fromkeys(choice.reasons[name] for choice in choices))
            raise ConfigError(Problem("attention_backend", name, f"cannot serve {spec} on any GPU: {reasons}"))


def rows(chosen: Choices) -> list[str]:
    """A line for each kernel and the layers that it serves, for people.

    First the training steps on the longest sequences, then all calls for which the same layer gets another kernel.
    """
    usual = {layer: _words(served.choice) for served in on_longest(chosen) for layer in served.layers}
    lines: dict[tuple[str, str], list[int]] = {}
    for layer in sorted(usual):
        lines.setdefault((usual[layer], ""), []).append(layer)
    for served in chosen:
        words = _words(served.choice)
        if others := [layer for layer in served.layers if usual[layer] != words]:
            lines.setdefault((words, _when(served, chosen)), []).extend(others)
    of_all = sorted(usual)
    each = {what: sorted(set(layers)) for what, layers in lines.items()}  # a ring has several calls of a layer
    return [
        f"{words}{when}{'' if layers == of_all else f': layers {ranges(layers)}'}"
        for (words, when), layers in each.items()
    ]


def try_out(chosen: Choices, device: torch.device) -> list[dict[str, Errors]]:
    """For each choice, the errors of the kernels that may serve it, in a small call on this device.

    Raises:
        ConfigError: an output or a gradient is wrong.
    """
    trials = []
    for _, choice, *_ in chosen:
        names = contenders(choice.candidates) if choice.measured else choice.candidates[:1]
        trials.append({name: require_right(name, choice.spec, choice.target, device) for name in names})
    return trials


@contextmanager
def compared(chosen: Choices) -> Iterator[None]:
    """In the block, warns once for each call that is not in `chosen`, or that another kernel serves."""
    known = {served.choice.spec: served.choice for served in chosen}

    def compare(spec: AttentionSpec, backend: str) -> None:
        choice = known.get(spec)
        right = choice is not None and (backend in choice.candidates if choice.measured else backend == choice.backend)
        if spec.training and not right:  # samples of what the model writes are not recorded
            warnings.warn(f"attention: {backend} serves {spec}, which attention.json does not say", stacklevel=2)

    with watched(compare):
        yield


def record(chosen: Choices, trials: list[dict[str, Errors]]) -> list[dict[str, Any]]:
    """The choices as JSON values: the `Served.to_dict` of each, and its trials.

    Args:
        trials: what `try_out` returned.
    """
    return [
        {**served.to_dict(), "trials": errors, "limit": LIMITS[served.choice.spec.dtype]}
        for served, errors in zip(chosen, trials, strict=True)
    ]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text, such as "0-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _when(served: Served, chosen: Choices) -> str:
    """The calls that it serves, in words."""
    shorter = served.lengths[0] < chosen[0].lengths[0]
    parts = [] if served.during == TRAINING else [served.during]
    if shorter:  # each stands for what is rounded up to it
        parts.append(f"longest document of {served.lengths[-1] // 2 + 1:,} to {served.lengths[0]:,} tokens")
    return f" ({', '.join(parts)})"


def _words(choice: Choice) -> str:
    where = choice.target.name
    if choice.measured:
        return f"the fastest of {', '.join(choice.candidates)} on {where}"
    return f"{choice.backend} on {where}"
