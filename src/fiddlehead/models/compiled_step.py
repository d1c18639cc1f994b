"""One decoding step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fiddlehead.attention import AttentionSpec, KVCache, Target, explain
from fiddlehead.errors import Problem, refuse
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.fused_step import FusedStep, fits
from fiddlehead.models.transformer import Transformer

_WARM_UP = 3
"""Steps before the capture: the compiler sees one length, then a different one, and then runs the result."""

_COMPILED = 64
"""Layers are compiled up to four times: for a length, for any length, for another cache length, for a batch."""


def refuse_compiled_step(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError if a model with weights of this dtype on this device cannot have a `CompiledStep`."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"a step is captured on a GPU, and the model is on {device}")
    if config.longrope_length is not None:
        reasons.append("LongRoPE depends on the length of the text")
    if config.num_moe_experts is not None and dtype != torch.bfloat16:
        reasons.append(f"experts' products are compiled in bfloat16 only, and the weights are {dtype}")
    if not reasons and (layer := _by_flex(config, device, dtype)) is not None:
        reasons.append(
            f"flex would decode {layer}, and its results for a batch are wrong in a compiled step; bfloat16 or a "
            "flash-attn package avoids it (`fiddlehead doctor`)"
        )
    refuse(Problem("compile", True, f"{reason}; leave compile out") for reason in reasons)


def _by_flex(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> AttentionSpec | None:
    """The calls of a decoding layer for which FlexAttention is chosen on this device; None if there are none.

    Seen with PyTorch 2.11 on an H200: its compiler fails on a mask that is computed from a cache's lengths in the same
    graph, and if it is kept from looking into them, rows of a batch get wrong tokens.
    """
    target = Target.of(device)
    for layer in range(config.num_layers):
        spec = replace(config.attention_spec(layer, dtype, training=False), cached=True)
        if explain(spec, target, config.attention_backend).backend == "flex":
            return spec
    return None


class CompiledStep:
    """Computes the logits of T new tokens of each sequence, with caches that already hold the earlier tokens.

    A step of a small model, or for one sequence, has hundreds of small kernels, and the host launches them more slowly
    than the GPU runs them. A captured graph launches all of them at once. The kernels are those of `FusedStep` for one
    sequence of a model that it fits, and otherwise PyTorch's compiler makes them. The first steps compile, which takes
    some seconds; they give the same tokens.

    Raises:
        ConfigError: `refuse_compiled_step` does.
    """

    def __init__(self, model: Transformer, caches: Sequence[KVCache], T: int = 1) -> None:
        weight = model.embedding.weight
        refuse_compiled_step(model.config, weight.device, weight.dtype)
        self._model, self._caches = model, caches
        self._ids = torch.zeros(caches[0].batch, T, dtype=torch.int64, device=weight.device)
        self._logits = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        # For 32 sequences the compiler's kernels were faster.
        self._fused = FusedStep(model, caches) if caches[0].batch == 1 and fits(model) else None
        self._warm_up = _WARM_UP if self._fused is None else 1
        self._layer = None
        if self._fused is None:
            self._layer = torch.compile(lambda layer, *arguments: layer(*arguments), fullgraph=True)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens, (B, T), to logits, (B, T, V); the next call overwrites them."""
        self._ids.copy_(tokens)
        if self._graph is not None:
            self._graph.replay()
            for cache in self._caches:
                cache.count_replayed(tokens.shape[1])
        elif self._steps < self._warm_up:
            self._logits = self._run()
        else:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._run()
            self._graph.replay()  # the capture itself computed nothing
        self._steps += 1
        return self._logits

    def _run(self) -> torch.Tensor:
        if self._fused is not None:
            return self._fused(self._ids)
        with torch._dynamo.config.patch(recompile_limit=_COMPILED):  # pyright: ignore
            x = self._model.hidden(self._ids, caches=self._caches, run_layer=self._layer)
        return self._model.logits(x)
