"""A decoding step of the usual dense decoder with a few kernels of its own for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fiddlehead.attention import KVCache, advance_together
from fiddlehead.models.block import MLP, Block
from fiddlehead.models.int8 import Int8Linear
from fiddlehead.models.linear import Linear
from fiddlehead.models.norms import ZeroCenteredRMSNorm
from fiddlehead.models.rope import Rope, Rotary
from fiddlehead.models.scaled import HAS_TRITON
from fiddlehead.models.transformer import Transformer

_ACTIVATIONS = ("swiglu", "geglu")

Product = Callable[..., torch.Tensor]


def fits(model: Transformer) -> bool:
    """Whether `FusedStep` serves this model on its device."""
    config = model.config
    return (
        _has_kernels(model.embedding.weight.device)
        and config.normalization == "RMSNorm"
        and config.norm_placement == "pre"
        and config.qk_layernorm in (None, "head")
        and config.activation in _ACTIVATIONS
        and config.position_embedding_type != "learned_absolute"
        and config.attention_backend == "auto"
        and config.attn_logit_softcapping is None
        and not config.attention_sinks
        and config.num_moe_experts is None
        and config.longrope_length is None
        and all(_is_plain(layer) for layer in model.layers)
    )


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and HAS_TRITON


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is whole in this process, and its weights are stored as they are or in int8."""
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return (
        isinstance(layer, Block)
        and layer.split.parts == 1
        and layer.self_attention.exchange is None
        and layer.self_attention.ring is None
        and len(linear) == 4
        and all(type(module) in (Linear, Int8Linear) for module in linear)
    )


class FusedStep:
    """Computes the logits of new tokens, with caches that hold the earlier tokens and count them on the device.

    A layer is five or six kernels: the norm is part of the product after it, the activation and the residual addition
    of the product before them, and the rotation and the cache's new row of attention.

    The model must be one that `fits`. Its weights may change between two steps, but not move.
    """

    def __init__(self, model: Transformer, caches: Sequence[KVCache]) -> None:
        from fiddlehead.models import decode_kernels  # needs Triton

        self._model, self._caches, self._kernels = model, caches, decode_kernels
        positions = torch.arange(caches[0].max_length, device=model.embedding.weight.device)
        self._ropes: dict[Rotary, Rope] = {}
        if model.config.position_embedding_type == "rope":
            for rotary in {model.config.rotary(layer) for layer in range(model.config.num_layers)}:
                cos, sin = rotary.tables(positions, caches[0].max_length)
                self._ropes[rotary] = cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens, (B, T), to logits, (B, T, V).

        Raises:
            ConfigError: a cache is full.
        """
        model = self._model
        for cache in self._caches:
            cache.refuse_full(tokens.shape[1])
        x = model.embed_tokens(tokens.flatten())
        for layer, cache in zip(model.layers, self._caches, strict=True):
            x = self._run(layer, x, cache)
        advance_together(self._caches, tokens.shape[1])
        logits = self._kernels.product(x, model.output_weight, **self._norm(model.final_layernorm))
        return model.capped(logits.view(*tokens.shape, -1))

    def _run(self, layer: Any, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """(B x T, C) to (B x T, C)."""
        config, attention, mlp = self._model.config, layer.self_attention, layer.mlp
        assert isinstance(mlp, MLP)
        qkv = self._product(x, attention.linear_qkv, **self._norm(layer.input_layernorm))
        normed = attention.q_layernorm is not None
        out = self._kernels.attend_to_cache(
            qkv,
            self._ropes[config.rotary(layer.number)] if self._ropes else None,
            cache.k,
            cache.v,
            cache.device_lengths,
            scale=config.softmax_scale or config.head_dim**-0.5,
            heads=config.num_attention_heads,
            left=attention.window_size[0],
            gains=(_gain(attention.q_layernorm), _gain(attention.k_layernorm)) if normed else None,
            eps=config.layernorm_epsilon,
        )
        added = {"factor": layer.multiplier}
        x = self._product(out, attention.linear_proj, added=x, **added)
        inner = self._product(x, mlp.linear_fc1, activation=mlp.activation, **self._norm(layer.pre_mlp_layernorm))
        return self._product(inner, mlp.linear_fc2, added=x, **added)

    def _product(self, x: torch.Tensor, layer: nn.Linear, **options: Any) -> torch.Tensor:
        scale = layer.scale if isinstance(layer, Int8Linear) else None
        return self._kernels.product(x, layer.weight, scale=scale, bias=layer.bias, **options)

    def _norm(self, norm: nn.Module) -> dict[str, Any]:
        return {"gain": _gain(norm), "eps": self._model.config.layernorm_epsilon}


def _gain(norm: Any) -> torch.Tensor:
    return 1 + norm.weight.float() if isinstance(norm, ZeroCenteredRMSNorm) else norm.weight
