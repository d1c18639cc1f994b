"""Merges key/value heads into fewer."""

from __future__ import annotations

from typing import Literal

import torch

from fiddlehead.models.config import TransformerConfig

Method = Literal["mean", "first", "random"]


def pool_heads(
    name: str,
    tensor: torch.Tensor,
    config: TransformerConfig,
    num_query_groups: int,
    method: Method,
    generator: torch.Generator,
) -> torch.Tensor:
    """Converts a parameter of a model of `config` to `num_query_groups` key/value heads, a divisor of its number.

    Adjacent heads become one, because adjacent query heads share one (Ainslie et al. 2023, section 2.1). Parameters
    without key/value heads are returned unchanged.

    Args:
        name: of the parameter.
        generator: draws "random" heads, with the standard deviation of a new model.
    """
    H, G, D = config.num_attention_heads, config.groups, config.head_dim

    def pooled(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.view(num_query_groups, G // num_query_groups, D, -1)
        match method:
            case "mean":
                heads = heads.double().mean(dim=1)
            case "first":
                heads = heads[:, 0]
            case "random":
                heads = torch.randn(heads[:, 0].shape, generator=generator) * config.init_method_std
                if rows.dim() == 1:  # a bias
                    heads = torch.zeros_like(heads)
        return heads.reshape(num_query_groups * D, *rows.shape[1:]).to(tensor.dtype)

    if ".linear_qkv." in name:
        q, k, v = tensor.split([H * D, G * D, G * D])
        return torch.cat([q, pooled(k), pooled(v)])
    if name.endswith("k_layernorm.weight") and config.qk_layernorm == "projection":
        return pooled(tensor) if method != "random" else torch.ones(num_query_groups * D, dtype=tensor.dtype)
    return tensor
