"""Where the CPU time of a training step goes, by kind of operation, and what each kind would take by itself."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from fiddlehead.attention import attend
from fiddlehead.models import TransformerConfig

KINDS: tuple[str, ...] = (
    "matrix products",
    "attention",
    "norms",
    "rotary positions",
    "SwiGLU",
    "loss",
    "optimizer",
    "residuals, embedding",
    "autograd, dispatch, Python",
)
_PRODUCTS = ("aten::mm", "aten::addmm")
_FUNCTIONS = {
    "fiddlehead.models.block.rotate": "rotary positions",
    "litgpt.model.apply_rope": "rotary positions",
    "transformers.models.llama.modeling_llama.apply_rotary_pos_emb": "rotary positions",
    "torch.nn.functional.cross_entropy": "loss",
}
_CLASSES = {
    "RMSNorm": "norms",
    "LlamaRMSNorm": "norms",
    "MLP": "SwiGLU",
    "LLaMAMLP": "SwiGLU",
    "LlamaMLP": "SwiGLU",
    "Attention": "attention",
    "CausalSelfAttention": "attention",
    "LlamaAttention": "attention",
    "_LinearCrossEntropy": "loss",
}
_LABEL = "kind: "


def measure(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each kind in the round that took least, by PyTorch's profiler, for one thread."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    with _labelled():
        for _ in range(rounds):
            for name, step in steps.items():
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                    start = time.process_time()
                    step()
                    seconds = time.process_time() - start
                found[name].append(_by_kind(profiler, 1000 * seconds))
    return {name: min(rounds_of, key=lambda kinds: sum(kinds.values())) for name, rounds_of in found.items()}


def alone(config: TransformerConfig, batch_size: int, seq_length: int) -> dict[str, dict[str, float]]:
    """Milliseconds of products and attention by themselves, and of the others' bytes at the speed of a copy."""
    N, C, F, V = batch_size * seq_length, config.hidden_size, config.ffn_size, config.vocab_size or 0
    H, G, D, L = config.num_attention_heads, config.groups, config.head_dim, config.num_layers
    products = sum(
        times * _best(lambda x=x, y=y: x @ y)
        for times, size in ((L, (C, (H + 2 * G) * D)), (L, (H * D, C)), (L, (C, 2 * F)), (L, (F, C)), (1, (C, V)))
        for x, y in _operands(N, *size)
    )
    qkv = torch.randn(batch_size, seq_length, H + 2 * G, D, requires_grad=True)
    grad = torch.randn(batch_size, seq_length, H, D)
    attention = L * _best(lambda: torch.autograd.grad(attend(*qkv.split([H, G, G], dim=2)), qkv, grad))
    source, target = (torch.ones(2**26) for _ in range(2))
    bytes_per_ms = 2 * source.nbytes / _best(lambda: target.copy_(source))
    parameters = L * (C * (H + 2 * G) * D + H * D * C + 3 * C * F) + C * V
    floats = {
        "norms": (2 * L + 1) * 5 * N * C,  # x, y; y's gradient, x, its gradient
        "rotary positions": L * 4 * N * (H + G) * D,
        "SwiGLU": L * 8 * N * F,  # gate, up, y; y's gradient, gate, up, their gradients
        "loss": 2 * N * V,
        "optimizer": 7 * parameters,  # weight, gradient and two moments are read, all but the gradient written
        "residuals, embedding": (2 * L + 1) * 6 * N * C,  # x, what is added, the sum; the same of the gradients
    }
    times = {kind: 4 * number / bytes_per_ms for kind, number in floats.items()}
    return {"alone": {"matrix products": products, "attention": attention, **times}}


def _operands(rows: int, inputs: int, outputs: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The operands of a linear layer's three products."""
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    yield from ((x, weight.T), (grad, weight), (grad.T, x))


def _best(work: Callable[[], Any], times: int = 30) -> float:
    """The least milliseconds of CPU time."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return 1000 * min(seconds)


@contextmanager
def _labelled() -> Iterator[None]:
    """Marks what the functions and modules above do in the profile."""

    def marked(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(_LABEL + kind):
                return function(*args, **kwargs)

        return run

    call = nn.Module.__call__

    def call_module(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = _CLASSES.get(type(self).__name__)
        return call(self, *args, **kwargs) if kind is None else marked(call, kind)(self, *args, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(nn.Module, "__call__", call_module))
        for path, kind in _FUNCTIONS.items():
            module, _, name = path.rpartition(".")
            original = getattr(importlib.import_module(module), name)
            patches.enter_context(mock.patch(path, marked(original, kind)))
        yield


def _by_kind(profiler: torch.profiler.profile, milliseconds: float) -> dict[str, float]:
    """The time of a step's events by kind; the rest of `milliseconds` is between them."""
    events: list[Any] = sorted(profiler.events() or (), key=lambda event: event.time_range.start)
    # Of the events with a sequence number, the last one in the forward pass made autograd's node.
    made_by = {event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not _node(event)}
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        found[_kind(event, made_by)] += event.self_cpu_time_total / 1000
    found[KINDS[-1]] += max(0.0, milliseconds - sum(found.values()))
    return found


def _kind(event: Any, made_by: Mapping[int, Any]) -> str:
    if event.name in _PRODUCTS:
        return "matrix products"
    if not event.name.startswith("aten::"):
        return KINDS[-1]
    if (kind := _label(event)) is None and (node := _node(event)) is not None and node.sequence_nr in made_by:
        kind = _label(made_by[node.sequence_nr])
    return kind or "residuals, embedding"


def _label(event: Any) -> str | None:
    """The kind of the innermost mark around an event."""
    for each in _outwards(event):
        if each.name.startswith(_LABEL):
            return each.name.removeprefix(_LABEL)
        if each.name in _CLASSES:
            return _CLASSES[each.name]
        if each.name.startswith("Optimizer."):
            return "optimizer"
    return None


def _node(event: Any) -> Any:
    """The event of autograd's engine that an event of the backward pass is part of."""
    return next((each for each in _outwards(event) if each.name.startswith("autograd::engine::evaluate")), None)


def _outwards(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent
