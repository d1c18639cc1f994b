"""Reduces a transformer's layers, and a batch, to one process's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.block import MLP, Attention
from fiddlehead.models.collectives import (
    Group,
    HeadExchange,
    SequenceSplit,
    all_reduce,
    linear_of_whole,
    scatter_sequence,
)
from fiddlehead.models.config import split_heads
from fiddlehead.models.lora import adapter_state
from fiddlehead.models.moe import MoE
from fiddlehead.models.norms import ZeroCenteredRMSNorm
from fiddlehead.models.parallel.shards import Layout, refuse_sizes, replicas
from fiddlehead.models.transformer import Transformer


def parallelize(transformer: Transformer, mesh: DeviceMesh) -> None:
    """Reduces a transformer, in place, to this process's part along "tp", "cp" and "ep" of a mesh.

    It then takes `local_batch`es and returns the logits of their tokens. Parameters may be on the meta device; values
    must be the same on all processes. Call it before `fully_shard`.

    Raises:
        ConfigError: the model cannot be split in this way, or tensor parallelism meets adapters.
    """
    config = transformer.config
    tp, cp, ep = (Group.of(mesh, dim) for dim in ("tp", "cp", "ep"))
    refuse_sizes(config, tp=tp.size, cp=cp.size, ep=ep.size)
    if tp.size > 1 and adapter_state(transformer):
        raise ConfigError(Problem("tp", tp.size, "a model with adapters (lora) cannot be split", (1,)))
    layout = Layout(config, mesh)
    for name, parameter in list(transformer.named_parameters()):
        local = layout.own(name, parameter.detach())
        if local.shape != parameter.shape:
            owner, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(owner), leaf, nn.Parameter(local, parameter.requires_grad))
    transformer.split = SequenceSplit(cp, tp)
    for module in list(transformer.modules()):
        if isinstance(module, Attention):
            if cp.size > 1:
                module.exchange = HeadExchange(cp)
            if tp.size > 1:
                module.heads, module.groups = split_heads(module.heads, module.groups, tp.size)
                module.linear_qkv = ColumnParallelLinear(module.linear_qkv, tp)
                module.linear_proj = RowParallelLinear(module.linear_proj, tp)
                if module.q_layernorm is not None and config.qk_layernorm == "projection":
                    module.q_layernorm = SplitRMSNorm(module.q_layernorm, tp, 1)
                    module.k_layernorm = SplitRMSNorm(module.k_layernorm, tp, replicas(config, tp.size))
        elif isinstance(module, MoE):
            module.sequence_groups = tuple(group for group in (cp, tp) if group.size > 1)
            module.experts.group = ep
        elif isinstance(module, MLP) and tp.size > 1:
            module.linear_fc1 = ColumnParallelLinear(module.linear_fc1, tp)
            module.linear_fc2 = RowParallelLinear(module.linear_fc2, tp)


def local_batch(batch: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """A batch with this process's part of `input_ids`, `labels` and `padding`, (B, T) to (B, T / (cp x tp)).

    All processes along "cp" and "tp" must have the same batch. `cu_seqlens` remain those of the whole sequences.

    Raises:
        ConfigError: T is not a multiple of cp x tp.
    """
    split = SequenceSplit(Group.of(mesh, "cp"), Group.of(mesh, "tp"))
    local = dict(batch)
    for name in ("input_ids", "labels", "padding"):
        if name not in batch:
            continue
        length = batch[name].shape[1]
        if length % split.parts:
            nearest = max(round(length / split.parts), 1) * split.parts
            message = f"a sequence has {length} tokens; must be a multiple of cp x tp={split.parts}, such as {nearest}"
            raise ConfigError(Problem(name, message=message))
        local[name] = split.own(batch[name], dim=1).contiguous()
    return local


class _Split(nn.Linear):
    """A linear layer with one process's part of the parameters."""

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        out_features, in_features = linear.weight.shape
        super().__init__(in_features, out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.group = group
        self.train(linear.training)


class ColumnParallelLinear(_Split):
    """A part of the sequence, (B, t, in), to a part of the outputs for the whole sequence, (B, T, out / n)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear_of_whole(input, self.weight, self.bias, self.group)


class RowParallelLinear(_Split):
    """A part of the inputs for the whole sequence, (B, T, in / n), to a part of the sequence, (B, t, out)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = scatter_sequence(F.linear(input, self.weight), self.group)
        return x if self.bias is None else x + self.bias.to(x.dtype)


class SplitRMSNorm(nn.Module):
    """RMSNorm of channels that are split over processes; `replicas` processes have the same channels."""

    def __init__(self, norm: Any, group: Group, replicas: int) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps, self.zero_centered = norm.eps, isinstance(norm, ZeroCenteredRMSNorm)
        self.group, self.replicas = group, replicas
        self.size = self.weight.numel() * group.size // replicas

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size / n) to the same."""
        wide = x.float()
        squares = all_reduce(wide.square().sum(dim=-1, keepdim=True), self.group) / self.replicas
        weight = self.weight.float()
        wide = wide * torch.rsqrt(squares / self.size + self.eps) * (1 + weight if self.zero_centered else weight)
        return wide.to(x.dtype)
