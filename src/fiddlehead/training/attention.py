"""Which kernel serves which layers of a run: for its plan, and for its record."""

from __future__ import annotations

from typing import Any

import torch

from fiddlehead.attention import BACKENDS, GPUS, Choice, Package, Packages, Target, explain
from fiddlehead.attention.measure import contenders
from fiddlehead.attention.packages import CUDNN_OF_CUDA_BUILDS, NEWEST_KNOWN
from fiddlehead.attention.trial import LIMITS, Errors, require_right
from fiddlehead.errors import ConfigError
from fiddlehead.models import TransformerConfig

LayerChoices = tuple[tuple[tuple[int, ...], Choice], ...]
"""For each different spec of a model's layers the indices of the layers that have it, and the choice."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that attention sees under a trainer's precision."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def choose(config: TransformerConfig, dtype: torch.dtype, target: Target, *, packed: bool) -> LayerChoices:
    """The kernels that training `config` takes on `target`.

    Raises:
        ConfigError: no backend can serve a layer, or the one named cannot; it lists every reason.
    """
    problems: list[str] = []
    chosen = []
    for spec, layers in config.attention_specs(dtype, packed=packed).items():
        choice = explain(spec, target, config.attention_backend)
        chosen.append((tuple(layers), choice))
        try:
            choice.required()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return tuple(chosen)


def refuse_impossible(config: TransformerConfig, dtype: torch.dtype, *, packed: bool) -> None:
    """Refuses a backend by name that no GPU could run; for a run on a machine of which nothing is known.

    Raises:
        ConfigError: it says why not, for each different reason.
    """
    name = config.attention_backend
    if name not in BACKENDS:
        return
    newest = {package: Package(version) for package, version in NEWEST_KNOWN.items()}
    packages = Packages(torch.__version__, CUDNN_OF_CUDA_BUILDS, **newest)
    for spec in config.attention_specs(dtype, packed=packed):
        choices = [explain(spec, Target.gpu(gpu, packages), name) for gpu in GPUS]
        if not any(choice.backend for choice in choices):
            reasons = "; ".join(dict.fromkeys(choice.reasons[name] for choice in choices))
            raise ConfigError(f"attention_backend={name!r} cannot serve {spec} on any GPU: {reasons}")


def rows(chosen: LayerChoices) -> list[str]:
    """A line for each kernel and the layers that it serves, for people."""
    lines = []
    by_words: dict[str, list[int]] = {}
    for layers, choice in chosen:
        by_words.setdefault(_words(choice), []).extend(layers)
    for words, layers in by_words.items():
        lines.append(words if len(by_words) == 1 else f"{words}: layers {ranges(sorted(layers))}")
    return lines


def try_out(chosen: LayerChoices, device: torch.device) -> list[dict[str, Errors]]:
    """For each choice, the errors that the kernels which may serve make in a small call on this device.

    Raises:
        ConfigError: an output or a gradient is wrong.
    """
    trials = []
    for _, choice in chosen:
        names = contenders(choice.candidates) if choice.measured else choice.candidates[:1]
        trials.append({name: require_right(name, choice.spec, choice.target, device) for name in names})
    return trials


def record(chosen: LayerChoices, trials: list[dict[str, Errors]]) -> list[dict[str, Any]]:
    """The choices as JSON: of each different spec the layers that have it, what `Choice.to_dict` says, and the trials.

    Args:
        trials: what `try_out` returned.
    """
    return [
        {"layers": list(layers), **choice.to_dict(), "trials": errors, "limit": LIMITS[choice.spec.dtype]}
        for (layers, choice), errors in zip(chosen, trials, strict=True)
    ]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as one would write them: 0-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _words(choice: Choice) -> str:
    where = choice.target.name
    if choice.measured:
        return f"the fastest of {', '.join(choice.candidates)} on {where}"
    return f"{choice.backend} on {where}"
